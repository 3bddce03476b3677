use super::*;
use k8s_openapi::api::core::v1::{
    ContainerState, ContainerStateRunning, ContainerStateWaiting, ContainerStatus, NodeCondition, NodeStatus,
    PodSpec, PodStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use podcheckpoint_crds::PodCheckpointSpec;
use podcheckpoint_crds::conditions::{Verdict, condition};

const NOW: i64 = 1_000_000;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(NOW + seconds).unwrap()
}

fn container_status(name: &str, runs: bool) -> ContainerStatus {
    let state = if runs {
        ContainerState {
            running: Some(ContainerStateRunning::default()),
            ..Default::default()
        }
    } else {
        let waiting = ContainerStateWaiting {
            reason: Some("CrashLoopBackOff".into()),
            message: None,
        };
        ContainerState {
            waiting: Some(waiting),
            ..Default::default()
        }
    };
    ContainerStatus {
        name: name.into(),
        state: Some(state),
        ..Default::default()
    }
}

fn pod() -> Pod {
    let mut pod = Pod::default();
    pod.metadata.name = Some("cart".into());
    pod.metadata.namespace = Some("shop".into());
    pod.metadata.uid = Some("uid-1".into());
    let container = |name: &str| k8s_openapi::api::core::v1::Container {
        name: name.into(),
        ..Default::default()
    };
    pod.spec = Some(PodSpec {
        node_name: Some("node1".into()),
        containers: vec![container("main"), container("broken")],
        init_containers: Some(vec![container("setup")]),
        ..Default::default()
    });
    pod.status = Some(PodStatus {
        phase: Some("Running".into()),
        container_statuses: Some(vec![
            container_status("main", true),
            container_status("broken", false),
        ]),
        ..Default::default()
    });
    pod
}

fn ensure_agent() -> Action {
    Action::EnsureAgent {
        node: "node1".into(),
        uid: None,
    }
}

fn node(ready: &str) -> Node {
    let condition = NodeCondition {
        type_: "Ready".into(),
        status: ready.into(),
        ..Default::default()
    };
    Node {
        status: Some(NodeStatus {
            conditions: Some(vec![condition]),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn world() -> World {
    let spec = PodCheckpointSpec {
        source_pod_name: "cart".into(),
        timeout_seconds: 300,
        ..Default::default()
    };
    let mut object = PodCheckpoint::new("first", spec);
    object.metadata.namespace = Some("shop".into());
    object.metadata.generation = Some(1);
    object.metadata.creation_timestamp = Some(Time(at(0)));
    World {
        object,
        pod: Some(pod()),
        node: Some(node("True")),
        agent: None,
        agent_denied: None,
        settings: Settings {
            namespace: "ops".into(),
            start_timeout: 60,
            idle_timeout: 300,
            template: String::new(),
        },
    }
}

/// The world after its plan has been carried out: what is applied replaces the controller's fields.
fn carry_out(world: &mut World, plan: &Plan) {
    for action in &plan.actions {
        match action {
            Action::AddFinalizer => world.object.finalizers_mut().push(FINALIZER.into()),
            Action::RemoveFinalizer => world.object.finalizers_mut().clear(),
            Action::WriteStatus(new) => merge(world.object.status.get_or_insert_default(), new),
            _ => {}
        }
    }
}

fn merge(status: &mut PodCheckpointStatus, new: &PodCheckpointStatus) {
    let new = new.clone();
    status.node_name = new.node_name.or(status.node_name.take());
    status.source_pod_uid = new.source_pod_uid.or(status.source_pod_uid.take());
    status.start_time = new.start_time.or(status.start_time.take());
    status.completion_time = new.completion_time.or(status.completion_time.take());
    status.reason = new.reason.or(status.reason.take());
    status.failure = new.failure.or(status.failure.take());
    for condition in new.conditions {
        status.conditions.retain(|c| c.type_ != condition.type_);
        status.conditions.push(condition);
    }
}

fn agent_sets(world: &mut World, r#type: ConditionType, verdict: Verdict, reason: Reason) {
    let status = world.object.status.get_or_insert_default();
    let new = condition(r#type, verdict, reason, "", None, &[], &Time(at(1)));
    merge(
        status,
        &PodCheckpointStatus {
            conditions: vec![new],
            ..Default::default()
        },
    );
}

/// An agent's pod; its container waits for a reason, or runs.
fn agent(waits: Option<&str>) -> Pod {
    let mut agent = Pod::default();
    let mut status = container_status("agent", waits.is_none());
    if let Some(reason) = waits {
        status.state.as_mut().unwrap().waiting.as_mut().unwrap().reason = Some(reason.into());
    }
    agent.status = Some(PodStatus {
        phase: Some("Running".into()),
        container_statuses: Some(vec![status]),
        ..Default::default()
    });
    agent
}

fn rejected() -> Pod {
    let mut agent = agent(None);
    let status = agent.status.as_mut().unwrap();
    status.phase = Some("Failed".into());
    status.reason = Some("OutOfcpu".into());
    agent
}

fn bound_world() -> World {
    let mut world = world();
    let first = plan(&world, at(0));
    carry_out(&mut world, &first);
    world
}

/// The agent said at that time, by its node's clock, that it begins.
fn begun_world(begun: Timestamp) -> World {
    let mut world = bound_world();
    world.agent = Some(agent(None));
    let status = world.object.status.as_mut().unwrap();
    status.archive_state = Some(ArchiveState::Writing);
    let begins = condition(
        ConditionType::Checkpointed,
        Verdict::Unknown,
        Reason::CheckpointInProgress,
        "",
        None,
        &[],
        &Time(begun),
    );
    status.conditions.retain(|c| c.type_ != begins.type_);
    status.conditions.push(begins);
    world
}

fn finished_world() -> World {
    let mut world = bound_world();
    world.object.status.as_mut().unwrap().archive_state = Some(ArchiveState::Present);
    agent_sets(
        &mut world,
        ConditionType::Checkpointed,
        Verdict::True,
        Reason::CheckpointCompleted,
    );
    agent_sets(
        &mut world,
        ConditionType::SourceRunning,
        Verdict::True,
        Reason::SourceRuns,
    );
    world
}

fn status(world: &World, r#type: ConditionType) -> (String, String) {
    let condition = world.object.condition(r#type).unwrap();
    (condition.status.clone(), condition.reason.clone())
}

fn writes(plan: &Plan) -> usize {
    let is_write = |a: &&Action| {
        matches!(
            a,
            Action::AddFinalizer | Action::WriteStatus(_) | Action::RemoveFinalizer
        )
    };
    plan.actions.iter().filter(is_write).count()
}

#[test]
fn a_running_pod_is_bound_to_its_node_with_all_conditions_set() {
    let world = bound_world();
    let status = world.object.status.unwrap();
    assert_eq!(
        (status.node_name.as_deref(), status.source_pod_uid.as_deref()),
        (Some("node1"), Some("uid-1"))
    );
    assert_eq!(status.conditions.len(), ConditionType::ALL.len());
}

#[test]
fn a_checkpoint_costs_three_writes_and_waiting_costs_none() {
    let mut world = world();
    let first = plan(&world, at(0));
    carry_out(&mut world, &first);
    world.agent = Some(agent(None));
    let waiting = plan(&world, at(1));
    world.object.status.as_mut().unwrap().archive_state = Some(ArchiveState::Writing);
    agent_sets(
        &mut world,
        ConditionType::Checkpointed,
        Verdict::Unknown,
        Reason::CheckpointInProgress,
    );
    let working = plan(&world, at(2));
    agent_sets(
        &mut world,
        ConditionType::Checkpointed,
        Verdict::True,
        Reason::CheckpointCompleted,
    );
    agent_sets(
        &mut world,
        ConditionType::SourceRunning,
        Verdict::True,
        Reason::SourceRuns,
    );
    let last = plan(&world, at(3));
    carry_out(&mut world, &last);
    let after = plan(&world, at(4));
    let costs = [first, waiting, working, last, after].map(|plan| writes(&plan));
    assert_eq!(costs, [2, 0, 0, 1, 0]);
}

#[test]
fn a_restart_after_the_finalizer_does_not_add_it_again() {
    let mut world = world();
    world.object.finalizers_mut().push(FINALIZER.into());
    let first = plan(&world, at(0));
    assert!(!first.actions.contains(&Action::AddFinalizer));
    assert_eq!(writes(&first), 1);
}

#[test]
fn a_restart_after_the_binding_launches_the_agent_and_binds_no_second_time() {
    let world = bound_world();
    assert_eq!(plan(&world, at(1)).actions, [ensure_agent()]);
}

#[test]
fn a_pod_without_the_named_target_is_not_bound_and_gets_no_finalizer() {
    let mut world = world();
    world.pod = None;
    assert_eq!(writes(&plan(&world, at(0))), 1);
}

#[test]
fn a_verified_archive_makes_it_ready() {
    let mut world = finished_world();
    let last = plan(&world, at(5));
    carry_out(&mut world, &last);
    assert_eq!(
        status(&world, ConditionType::Ready),
        ("True".into(), "CheckpointCompleted".into())
    );
    assert_eq!(
        status(&world, ConditionType::Stalled),
        ("False".into(), "NotFailed".into())
    );
}

#[test]
fn terminal_stays_terminal() {
    let mut world = finished_world();
    let last = plan(&world, at(5));
    carry_out(&mut world, &last);
    world.pod = None;
    world.node = None;
    agent_sets(
        &mut world,
        ConditionType::Checkpointed,
        Verdict::False,
        Reason::DumpFailed,
    );
    assert_eq!(plan(&world, at(100_000)), Plan::default());
}

#[test]
fn a_target_that_cannot_be_checkpointed_ends_at_once_with_its_reason() {
    type Change = fn(&mut World);
    let cases: [(Change, Reason); 11] = [
        (|w| w.pod = None, Reason::PodNotFound),
        (
            |w| w.pod.as_mut().unwrap().status.as_mut().unwrap().phase = Some("Pending".into()),
            Reason::PodNotRunning,
        ),
        (
            |w| w.pod.as_mut().unwrap().status.as_mut().unwrap().phase = Some("Succeeded".into()),
            Reason::PodCompleted,
        ),
        (
            |w| w.pod.as_mut().unwrap().metadata.deletion_timestamp = Some(Time(at(0))),
            Reason::PodTerminating,
        ),
        (
            |w| w.object.spec.source_pod_uid = Some("other".into()),
            Reason::SourcePodReplaced,
        ),
        (
            |w| w.object.spec.containers = Some(vec!["nobody".into()]),
            Reason::ContainerNotFound,
        ),
        (
            |w| w.object.spec.containers = Some(vec!["setup".into()]),
            Reason::ContainerNotRegular,
        ),
        (
            |w| w.object.spec.containers = Some(vec!["broken".into()]),
            Reason::ContainerNotRunning,
        ),
        (
            |w| w.pod.as_mut().unwrap().spec.as_mut().unwrap().host_pid = Some(true),
            Reason::PodHostPid,
        ),
        (|w| w.settings.namespace = "shop".into(), Reason::PodProtected),
        (|w| w.node = Some(node("Unknown")), Reason::NodeNotReady),
    ];
    for (change, reason) in cases {
        let mut world = world();
        change(&mut world);
        let only = plan(&world, at(0));
        carry_out(&mut world, &only);
        let object = &world.object;
        assert_eq!(
            status(&world, ConditionType::Stalled),
            ("True".into(), reason.as_str().into())
        );
        assert_eq!(
            object.status.as_ref().unwrap().reason.as_deref(),
            Some(reason.as_str())
        );
        assert_eq!(
            object.status.as_ref().unwrap().failure.as_ref().unwrap().reason,
            reason.as_str()
        );
        assert!(
            !only
                .actions
                .iter()
                .any(|a| matches!(a, Action::EnsureAgent { .. }))
        );
    }
}

#[test]
fn an_agent_that_cannot_start_is_a_reason() {
    let cases = [
        (agent(Some("ImagePullBackOff")), Reason::AgentImageUnavailable),
        (agent(Some("InvalidImageName")), Reason::AgentImageUnavailable),
        (agent(Some("ErrImageNeverPull")), Reason::AgentImageUnavailable),
        (agent(Some("CrashLoopBackOff")), Reason::AgentNotStarted),
        (rejected(), Reason::AgentRejected),
    ];
    for (agent, reason) in cases {
        let mut world = bound_world();
        world.agent = Some(agent);
        let next = plan(&world, at(2));
        carry_out(&mut world, &next);
        assert_eq!(
            status(&world, ConditionType::Stalled),
            ("True".into(), reason.as_str().into())
        );
        assert_eq!(
            world.object.status.unwrap().failure.unwrap().step,
            Step::StartAgent
        );
    }
}

#[test]
fn an_agent_that_may_still_start_is_waited_for() {
    for reason in ["ContainerCreating", "ErrImagePull", "PodInitializing"] {
        let mut world = bound_world();
        world.agent = Some(agent(Some(reason)));
        assert!(plan(&world, at(59)).actions.is_empty(), "{reason}");
        let late = plan(&world, at(60));
        carry_out(&mut world, &late);
        assert_eq!(status(&world, ConditionType::Stalled).1, "AgentNotStarted");
    }
}

#[test]
fn a_kubelet_that_is_silent_is_suspected() {
    let mut world = bound_world();
    world.agent = Some(Pod::default());
    let late = plan(&world, at(60));
    carry_out(&mut world, &late);
    let message = world.object.status.unwrap().failure.unwrap().message;
    assert!(message.contains("the kubelet has not taken notice"), "{message}");
}

#[test]
fn what_an_agent_of_an_older_template_says_does_not_count() {
    let mut world = bound_world();
    world.agent = Some(agent(Some("ImagePullBackOff")));
    world.settings.template = "newer".into();
    assert!(plan(&world, at(2)).actions.is_empty());
}

#[test]
fn a_rejected_agent_makes_room_for_the_next() {
    let mut world = bound_world();
    world.agent = Some(rejected());
    assert!(
        plan(&world, at(2))
            .actions
            .contains(&Action::DeleteAgent(Box::new(rejected())))
    );
    world.object.status.as_mut().unwrap().archive_state = Some(ArchiveState::Writing);
    assert_eq!(
        plan(&world, at(2)).actions,
        [Action::DeleteAgent(Box::new(rejected()))]
    );
}

#[test]
fn an_agent_that_vanishes_at_work_is_launched_again_to_say_what_became_of_the_pod() {
    let mut world = bound_world();
    world.object.status.as_mut().unwrap().archive_state = Some(ArchiveState::Writing);
    assert_eq!(plan(&world, at(2)).actions, [ensure_agent()]);
}

#[test]
fn a_node_that_is_gone_ends_at_once_what_has_not_begun() {
    let mut world = bound_world();
    world.node = None;
    let next = plan(&world, at(1));
    carry_out(&mut world, &next);
    assert_eq!(status(&world, ConditionType::Stalled).1, "NodeGone");
}

#[test]
fn a_remedy_can_be_pasted() {
    let mut world = bound_world();
    world.agent = Some(agent(Some("CrashLoopBackOff")));
    let next = plan(&world, at(2));
    carry_out(&mut world, &next);
    let remedy = world.object.status.unwrap().failure.unwrap().remedy;
    assert!(
        remedy.contains("kubectl describe pod podcheckpoint-agent-"),
        "{remedy}"
    );
    assert!(remedy.contains("-n ops"), "{remedy}");
}

#[test]
fn a_remedy_names_the_node_also_before_the_binding() {
    let mut world = world();
    world.node = Some(node("Unknown"));
    let only = plan(&world, at(0));
    carry_out(&mut world, &only);
    let remedy = world.object.status.unwrap().failure.unwrap().remedy;
    assert!(remedy.contains("kubectl describe node node1"), "{remedy}");
}

#[test]
fn what_the_agent_found_is_the_root_cause() {
    let mut world = finished_world();
    world.object.status.as_mut().unwrap().failure = Some(podcheckpoint_crds::Failure {
        step: Step::Dump,
        reason: "CriuMissing".into(),
        message: "no criu on the node".into(),
        remedy: "Install it.".into(),
        log_path: None,
    });
    let last = plan(&world, at(5));
    carry_out(&mut world, &last);
    assert_eq!(
        status(&world, ConditionType::Ready),
        ("False".into(), "CheckpointFailed".into())
    );
    assert_eq!(
        status(&world, ConditionType::Stalled),
        ("True".into(), "CriuMissing".into())
    );
    let message = &world.object.condition(ConditionType::Ready).unwrap().message;
    assert_eq!(message, "no criu on the node. Install it.");
}

#[test]
fn the_agents_own_failure_and_conditions_are_not_written_by_the_controller() {
    let mut world = finished_world();
    world.object.status.as_mut().unwrap().failure = Some(podcheckpoint_crds::Failure {
        step: Step::Dump,
        reason: "DumpFailed".into(),
        message: "m".into(),
        remedy: String::new(),
        log_path: None,
    });
    let last = plan(&world, at(5));
    let Some(Action::WriteStatus(new)) = last.actions.first() else {
        panic!("{last:?}")
    };
    assert_eq!(new.failure, None);
    let written: Vec<_> = new.conditions.iter().map(|c| c.type_.as_str()).collect();
    assert!(
        !written.contains(&"Checkpointed") && !written.contains(&"SourceRunning"),
        "{written:?}"
    );
}

#[test]
fn a_refused_agent_pod_is_quoted() {
    let mut world = bound_world();
    world.agent_denied = Some("violates PodSecurity \"restricted\"".into());
    let next = plan(&world, at(1));
    carry_out(&mut world, &next);
    let failure = world.object.status.unwrap().failure.unwrap();
    assert_eq!(
        (failure.reason.as_str(), failure.message.contains("PodSecurity")),
        ("AgentDenied", true)
    );
}

#[test]
fn a_node_that_stops_while_the_agent_starts_is_named() {
    let mut world = bound_world();
    world.agent = Some(Pod::default());
    world.node = Some(node("Unknown"));
    let early = plan(&world, at(10));
    assert_eq!(writes(&early), 0);
    let late = plan(&world, at(61));
    carry_out(&mut world, &late);
    assert_eq!(status(&world, ConditionType::Stalled).1, "NodeNotReady");
}

#[test]
fn a_silent_agent_is_given_up_after_the_deadline_and_not_before() {
    let mut world = begun_world(at(1));
    assert_eq!(writes(&plan(&world, at(330))), 0);
    let late = plan(&world, at(332));
    carry_out(&mut world, &late);
    assert_eq!(status(&world, ConditionType::Stalled).1, "AgentLost");
    // Nobody can say that nothing was done to the pod.
    assert_eq!(
        status(&world, ConditionType::SourceRunning),
        ("Unknown".into(), "SourceUnknown".into())
    );
}

#[test]
fn an_agent_that_came_late_has_all_of_its_time() {
    let world = begun_world(at(50));
    assert_eq!(writes(&plan(&world, at(379))), 0);
    assert_eq!(writes(&plan(&world, at(381))), 1);
}

#[test]
fn a_node_whose_clock_is_wrong_moves_no_deadline_by_more_than_the_agents_start_may_take() {
    assert_eq!(writes(&plan(&begun_world(at(90_000)), at(391))), 1);
    assert_eq!(writes(&plan(&begun_world(at(-90_000)), at(329))), 0);
}

#[test]
fn an_agent_that_has_not_begun_is_late_and_not_lost() {
    let mut world = bound_world();
    world.object.spec.timeout_seconds = 5;
    world.agent = Some(Pod::default());
    assert_eq!(writes(&plan(&world, at(59))), 0);
    let late = plan(&world, at(61));
    carry_out(&mut world, &late);
    assert_eq!(status(&world, ConditionType::Stalled).1, "AgentNotStarted");
    assert_eq!(status(&world, ConditionType::SourceRunning).1, "NotReached");
}

#[test]
fn what_an_agent_from_before_has_failed_of_is_no_failure_of_this_one() {
    for mut old in [
        rejected(),
        agent(Some("ImagePullBackOff")),
        agent(Some("CrashLoopBackOff")),
    ] {
        old.metadata.creation_timestamp = Some(Time(at(-100)));
        let mut world = bound_world();
        world.agent = Some(old.clone());
        assert_eq!(plan(&world, at(2)).actions, [Action::DeleteAgent(Box::new(old))]);
    }
}

#[test]
fn a_setting_that_is_still_changed_keeps_an_agent_and_the_controller_looking() {
    let mut world = finished_world();
    let last = plan(&world, at(5));
    carry_out(&mut world, &last);
    let open = serde_json::json!({
        "kind": "Freezer", "setting": "x", "scope": "container", "before": "x", "after": "x", "exposes": "x",
        "atMostSeconds": 0, "appliedTime": "2026-01-01T00:00:00Z",
    });
    world.object.status.as_mut().unwrap().patches = vec![serde_json::from_value(open).unwrap()];
    let looking = plan(&world, at(6));
    assert_eq!(looking.actions, [ensure_agent()]);
    assert!(looking.requeue.is_some());
}

#[test]
fn waiting_asks_for_one_look_at_the_next_deadline_and_writes_nothing() {
    let mut world = bound_world();
    world.agent = Some(Pod::default());
    let waiting = plan(&world, at(0));
    assert!(waiting.actions.is_empty());
    assert!(waiting.requeue.unwrap() >= Duration::from_secs(60));
}

#[test]
fn a_replaced_pod_has_the_reason_of_the_upstream_api() {
    let mut world = world();
    world.object.spec.source_pod_uid = Some("uid-0".into());
    let only = plan(&world, at(0));
    carry_out(&mut world, &only);
    assert_eq!(
        status(&world, ConditionType::Ready),
        ("False".into(), "SourcePodReplaced".into())
    );
}

#[test]
fn every_condition_that_is_not_true_has_a_documented_reason() {
    let mut worlds = vec![bound_world(), finished_world()];
    let mut missing = world();
    missing.pod = None;
    worlds.push(missing);
    for mut world in worlds {
        let next = plan(&world, at(400));
        carry_out(&mut world, &next);
        for condition in &world.object.status.as_ref().unwrap().conditions {
            assert!(Reason::parse(&condition.reason).is_some(), "{condition:?}");
        }
    }
}

fn deleting(world: &mut World) {
    world.object.metadata.deletion_timestamp = Some(Time(at(10)));
}

#[test]
fn deletion_waits_for_the_agent_to_delete_the_archive() {
    let mut world = finished_world();
    deleting(&mut world);
    let next = plan(&world, at(11));
    assert_eq!(next.actions, [ensure_agent()]);
    world.object.status.as_mut().unwrap().archive_state = Some(ArchiveState::Deleted);
    assert_eq!(plan(&world, at(12)).actions, [Action::RemoveFinalizer]);
}

#[test]
fn deletion_waits_for_the_agent_to_delete_a_profile_for_the_next_start() {
    let mut world = finished_world();
    let status = world.object.status.as_mut().unwrap();
    status.archive_state = Some(ArchiveState::Nothing);
    let profile = serde_json::json!({
        "kind": "Seccomp", "setting": "x", "scope": "x", "before": "x", "after": "x", "exposes": "x", "atMostSeconds": 0,
        "appliedTime": "2026-01-01T00:00:00Z",
    });
    status.patches = vec![serde_json::from_value(profile).unwrap()];
    assert!(
        plan(&world, at(9))
            .actions
            .iter()
            .all(|action| *action != ensure_agent())
    );
    deleting(&mut world);
    assert!(plan(&world, at(11)).actions.contains(&ensure_agent()));
    world.object.status.as_mut().unwrap().patches[0].reverted_time = Some(Time(at(12)));
    assert!(plan(&world, at(12)).actions.contains(&Action::RemoveFinalizer));
}

#[test]
fn deletion_completes_when_the_node_is_gone_and_when_no_agent_answers() {
    let mut world = finished_world();
    deleting(&mut world);
    assert_eq!(plan(&world, at(131)).actions, [Action::RemoveFinalizer]);
    world.node = None;
    assert_eq!(plan(&world, at(11)).actions, [Action::RemoveFinalizer]);
}

#[test]
fn an_archive_that_is_to_be_kept_does_not_hold_up_deletion() {
    let mut world = finished_world();
    world.object.spec.deletion_policy = DeletionPolicy::Retain;
    deleting(&mut world);
    assert_eq!(plan(&world, at(11)).actions, [Action::RemoveFinalizer]);
}

#[test]
fn a_finished_object_is_deleted_when_its_time_to_live_is_over() {
    let mut world = finished_world();
    world.object.spec.ttl_seconds_after_finished = Some(60);
    let last = plan(&world, at(5));
    carry_out(&mut world, &last);
    assert!(plan(&world, at(64)).actions.is_empty());
    assert_eq!(plan(&world, at(66)).actions, [Action::DeleteObject]);
}

#[test]
fn validate_only_ends_ready_without_an_archive() {
    let mut world = bound_world();
    world.object.spec.validate_only = true;
    agent_sets(
        &mut world,
        ConditionType::Checkpointed,
        Verdict::Unknown,
        Reason::NotRequested,
    );
    agent_sets(
        &mut world,
        ConditionType::SourceRunning,
        Verdict::True,
        Reason::SourceRuns,
    );
    let last = plan(&world, at(5));
    carry_out(&mut world, &last);
    assert_eq!(
        status(&world, ConditionType::Ready),
        ("True".into(), "ValidationCompleted".into())
    );
}

#[test]
fn a_pod_left_frozen_is_said_first() {
    let mut world = finished_world();
    agent_sets(
        &mut world,
        ConditionType::SourceRunning,
        Verdict::False,
        Reason::SourceFrozen,
    );
    let last = plan(&world, at(5));
    carry_out(&mut world, &last);
    let message = world
        .object
        .condition(ConditionType::Ready)
        .unwrap()
        .message
        .clone();
    assert!(message.starts_with("WARNING"), "{message}");
}
