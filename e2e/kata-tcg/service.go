package main

import (
	"context"
	"encoding/json"
	"os"
	"sync"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/protobuf"
	ptypes "github.com/containerd/containerd/v2/pkg/protobuf/types"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"podcheckpoint.dev/e2e/kata-tcg/wire"
)

// What the CRI plugin writes into a container's specification.
const (
	sandboxAnnotation = "io.kubernetes.cri.sandbox-id"
	typeAnnotation    = "io.kubernetes.cri.container-type"
)

// service is the task API of one sandbox.
type service struct {
	publisher  shim.Publisher
	shutdown   shutdown.Service
	events     chan any
	mu         sync.Mutex
	machine    *machine
	containers map[string]*container
}

func newService(ctx context.Context, publisher shim.Publisher, stop shutdown.Service) *service {
	s := &service{
		publisher: publisher, shutdown: stop, events: make(chan any, 128), containers: map[string]*container{},
	}
	go s.forward(ctx)
	return s
}

func (s *service) RegisterTTRPC(server *ttrpc.Server) error {
	taskapi.RegisterTTRPCTaskService(server, s)
	return nil
}

// forward keeps the events in their order.
func (s *service) forward(ctx context.Context) {
	namespace, _ := namespaces.Namespace(ctx)
	for event := range s.events {
		limited, cancel := context.WithTimeout(namespaces.WithNamespace(context.Background(), namespace), 5*time.Second)
		if err := s.publisher.Publish(limited, runtime.GetTopic(event), event); err != nil {
			log.G(ctx).WithError(err).Error("event")
		}
		cancel()
	}
}

// find gives a container and, where an exec is named, that; else the container's own process.
func (s *service) find(id, exec string) (*container, *process, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	found := s.containers[id]
	if found == nil {
		return nil, nil, errgrpc.ToGRPCf(errdefs.ErrNotFound, "container %s", id)
	}
	if exec == "" {
		return found, found.process, nil
	}
	process := found.execs[exec]
	if process == nil {
		return nil, nil, errgrpc.ToGRPCf(errdefs.ErrNotFound, "exec %s", exec)
	}
	return found, process, nil
}

func (s *service) Create(ctx context.Context, r *taskapi.CreateTaskRequest) (*taskapi.CreateTaskResponse, error) {
	if r.Terminal {
		return nil, errgrpc.ToGRPCf(errdefs.ErrNotImplemented, "terminals")
	}
	spec, err := readSpec(r.Bundle)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	made := &container{
		id: r.ID, bundle: r.Bundle, spec: spec, execs: map[string]*process{},
		process: newProcess(r.Stdin, r.Stdout, r.Stderr),
	}
	if s.machine == nil {
		made.sandbox = true
		settings, err := configurationOf(r)
		if err != nil {
			return nil, errgrpc.ToGRPC(err)
		}
		if s.machine, err = startMachine(ctx, r.ID, spec, settings); err != nil {
			return nil, errgrpc.ToGRPC(err)
		}
	} else if err := made.carryIn(s.machine, r.Rootfs); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	s.mu.Lock()
	s.containers[r.ID] = made
	s.mu.Unlock()
	s.events <- &eventsapi.TaskCreate{
		ContainerID: r.ID, Bundle: r.Bundle, Rootfs: r.Rootfs, Pid: s.pid(),
		IO: &eventsapi.TaskIO{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr},
	}
	return &taskapi.CreateTaskResponse{Pid: s.pid()}, nil
}

// configurationOf reads the file that containerd's settings name for the handler.
func configurationOf(r *taskapi.CreateTaskRequest) (configuration, error) {
	path := ""
	if r.Options != nil {
		options, err := typeurl.UnmarshalAny(r.Options)
		if err != nil {
			return configuration{}, err
		}
		if named, ok := options.(*runtimeoptions.Options); ok {
			path = named.ConfigPath
		}
	}
	return readConfiguration(path)
}

// pid is the VMM's for everything: the processes in the guest have none here.
func (s *service) pid() uint32 {
	if s.machine == nil {
		return 0
	}
	return uint32(s.machine.pid)
}

func (s *service) Start(ctx context.Context, r *taskapi.StartRequest) (*taskapi.StartResponse, error) {
	found, process, err := s.find(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	switch {
	case found.sandbox && r.ExecID == "":
		process.begun()
		go func() {
			<-s.machine.ended
			s.ended(found, process, "", 137)
		}()
	case found.sandbox:
		return nil, errgrpc.ToGRPCf(errdefs.ErrNotImplemented, "processes in the sandbox itself")
	default:
		request := wire.Request{Op: "run", ID: r.ID, Spec: found.spec}
		if r.ExecID != "" {
			request = wire.Request{Op: "exec", ID: r.ID, Exec: r.ExecID, Process: process.spec}
		}
		err := process.start(ctx, s.machine, request, func(code uint32) { s.ended(found, process, r.ExecID, code) })
		if err != nil {
			return nil, errgrpc.ToGRPC(err)
		}
	}
	if r.ExecID == "" {
		s.events <- &eventsapi.TaskStart{ContainerID: r.ID, Pid: s.pid()}
	} else {
		s.events <- &eventsapi.TaskExecStarted{ContainerID: r.ID, ExecID: r.ExecID, Pid: s.pid()}
	}
	return &taskapi.StartResponse{Pid: s.pid()}, nil
}

func (s *service) ended(found *container, process *process, exec string, code uint32) {
	process.finish(code)
	id := exec
	if id == "" {
		id = found.id
	}
	s.events <- &eventsapi.TaskExit{
		ContainerID: found.id, ID: id, Pid: s.pid(), ExitStatus: code, ExitedAt: protobuf.ToTimestamp(process.exitedAt),
	}
}

func (s *service) Delete(ctx context.Context, r *taskapi.DeleteRequest) (*taskapi.DeleteResponse, error) {
	found, process, err := s.find(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if process.status() == tasktypes.Status_RUNNING {
		return nil, errgrpc.ToGRPCf(errdefs.ErrFailedPrecondition, "%s runs", r.ID)
	}
	if !found.sandbox {
		select {
		case <-s.machine.ended:
		default:
			if err := s.machine.ask(wire.Request{Op: "delete", ID: r.ID, Exec: r.ExecID}); err != nil {
				log.G(ctx).WithError(err).Warn("delete")
			}
		}
	} else if r.ExecID == "" {
		s.machine.stop()
	}
	s.mu.Lock()
	if r.ExecID != "" {
		delete(found.execs, r.ExecID)
	} else {
		delete(s.containers, r.ID)
	}
	s.mu.Unlock()
	answer := &taskapi.DeleteResponse{
		Pid: s.pid(), ExitStatus: process.code, ExitedAt: protobuf.ToTimestamp(process.exitedAt),
	}
	if r.ExecID == "" {
		s.events <- &eventsapi.TaskDelete{
			ContainerID: r.ID, Pid: answer.Pid, ExitStatus: answer.ExitStatus, ExitedAt: answer.ExitedAt,
		}
	}
	return answer, nil
}

func (s *service) Exec(ctx context.Context, r *taskapi.ExecProcessRequest) (*ptypes.Empty, error) {
	if r.Terminal {
		return nil, errgrpc.ToGRPCf(errdefs.ErrNotImplemented, "terminals")
	}
	found, _, err := s.find(r.ID, "")
	if err != nil {
		return nil, err
	}
	made := newProcess(r.Stdin, r.Stdout, r.Stderr)
	made.spec = &specs.Process{}
	if err := json.Unmarshal(r.Spec.Value, made.spec); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	confineless(made.spec)
	s.mu.Lock()
	defer s.mu.Unlock()
	if found.execs[r.ExecID] != nil {
		return nil, errgrpc.ToGRPCf(errdefs.ErrAlreadyExists, "exec %s", r.ExecID)
	}
	found.execs[r.ExecID] = made
	s.events <- &eventsapi.TaskExecAdded{ContainerID: r.ID, ExecID: r.ExecID}
	return &ptypes.Empty{}, nil
}

func (s *service) Kill(ctx context.Context, r *taskapi.KillRequest) (*ptypes.Empty, error) {
	found, process, err := s.find(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if process.status() == tasktypes.Status_STOPPED {
		return nil, errgrpc.ToGRPCf(errdefs.ErrNotFound, "%s has ended", r.ID)
	}
	if found.sandbox {
		endMachine(s.machine.id)
		if process.status() == tasktypes.Status_CREATED {
			s.ended(found, process, "", 137)
		}
		return &ptypes.Empty{}, nil
	}
	if process.status() == tasktypes.Status_CREATED {
		s.ended(found, process, r.ExecID, 137)
		return &ptypes.Empty{}, nil
	}
	err = s.machine.ask(wire.Request{Op: "kill", ID: r.ID, Exec: r.ExecID, Signal: r.Signal, All: r.All})
	return &ptypes.Empty{}, errgrpc.ToGRPC(err)
}

func (s *service) Wait(ctx context.Context, r *taskapi.WaitRequest) (*taskapi.WaitResponse, error) {
	_, process, err := s.find(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	select {
	case <-process.exited:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return &taskapi.WaitResponse{ExitStatus: process.code, ExitedAt: protobuf.ToTimestamp(process.exitedAt)}, nil
}

func (s *service) State(ctx context.Context, r *taskapi.StateRequest) (*taskapi.StateResponse, error) {
	found, process, err := s.find(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	return &taskapi.StateResponse{
		ID: r.ID, ExecID: r.ExecID, Bundle: found.bundle, Pid: s.pid(), Status: process.status(),
		Stdin: process.paths[0], Stdout: process.paths[1], Stderr: process.paths[2],
		ExitStatus: process.code, ExitedAt: protobuf.ToTimestamp(process.exitedAt),
	}, nil
}

func (s *service) Pids(ctx context.Context, r *taskapi.PidsRequest) (*taskapi.PidsResponse, error) {
	return &taskapi.PidsResponse{Processes: []*tasktypes.ProcessInfo{{Pid: s.pid()}}}, nil
}

func (s *service) Connect(ctx context.Context, r *taskapi.ConnectRequest) (*taskapi.ConnectResponse, error) {
	return &taskapi.ConnectResponse{ShimPid: uint32(os.Getpid()), TaskPid: s.pid()}, nil
}

func (s *service) Pause(ctx context.Context, r *taskapi.PauseRequest) (*ptypes.Empty, error) {
	return s.freeze(r.ID, "pause", true)
}

func (s *service) Resume(ctx context.Context, r *taskapi.ResumeRequest) (*ptypes.Empty, error) {
	return s.freeze(r.ID, "resume", false)
}

func (s *service) freeze(id, op string, paused bool) (*ptypes.Empty, error) {
	_, process, err := s.find(id, "")
	if err != nil {
		return nil, err
	}
	if err := s.machine.ask(wire.Request{Op: op, ID: id}); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	process.pause(paused)
	return &ptypes.Empty{}, nil
}

func (s *service) CloseIO(ctx context.Context, r *taskapi.CloseIORequest) (*ptypes.Empty, error) {
	_, process, err := s.find(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if r.Stdin {
		process.closeStdin()
	}
	return &ptypes.Empty{}, nil
}

func (s *service) Stats(ctx context.Context, r *taskapi.StatsRequest) (*taskapi.StatsResponse, error) {
	if s.machine == nil || s.machine.cgroup == nil {
		return nil, errgrpc.ToGRPCf(errdefs.ErrNotFound, "no cgroup")
	}
	metrics, err := s.machine.cgroup.Stat()
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	packed, err := typeurl.MarshalAnyToProto(metrics)
	if err != nil {
		return nil, err
	}
	return &taskapi.StatsResponse{Stats: packed}, nil
}

// Checkpoint is what Kata has: nothing, in these words.
func (s *service) Checkpoint(ctx context.Context, r *taskapi.CheckpointTaskRequest) (*ptypes.Empty, error) {
	return nil, errgrpc.ToGRPCf(errdefs.ErrNotImplemented, "service Checkpoint")
}

func (s *service) ResizePty(ctx context.Context, r *taskapi.ResizePtyRequest) (*ptypes.Empty, error) {
	return nil, errgrpc.ToGRPCf(errdefs.ErrNotImplemented, "terminals")
}

// Update has nothing to change: the guest's containers have no limits of their own.
func (s *service) Update(ctx context.Context, r *taskapi.UpdateTaskRequest) (*ptypes.Empty, error) {
	return &ptypes.Empty{}, nil
}

func (s *service) Shutdown(ctx context.Context, r *taskapi.ShutdownRequest) (*ptypes.Empty, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.containers) > 0 {
		return &ptypes.Empty{}, nil
	}
	if s.machine != nil {
		endMachine(s.machine.id)
	}
	s.shutdown.Shutdown()
	return &ptypes.Empty{}, nil
}
