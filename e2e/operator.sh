# shellcheck shell=bash
# Building the operator and installing it on the local cluster. Sourced by demo, test and bench.

# say WORDS...
say() { printf '%(%H:%M:%S)T  %s\n' -1 "$*" >&2; }

# build_operator: compiles the programs and makes their images on the nodes of the local cluster.
build_operator() {
  local built program triple profile=${PODCHECKPOINT_PROFILE:-debug}
  say "compiling the operator ($profile)"
  cargo build --quiet --locked --profile "${profile/debug/dev}" --package podcheckpoint-controller --package podcheckpoint-agent \
    --package podcheckpoint-probe --package podcheckpoint-e2e || return
  triple=$(rustc -vV | sed -n 's/^host: //p')
  built=$(mktemp -d)
  mkdir "$built/out"
  for program in podcheckpoint-controller podcheckpoint-agent podcheckpoint-probe; do
    # Symbols are half of a debug build, and images are copied to every node.
    strip -o "$built/out/$program" "${CARGO_TARGET_DIR:-target}/$triple/$profile/$program"
  done
  # The tag stays the same: by this a Deployment of an earlier build is told from one of this.
  PODCHECKPOINT_BUILD=$(cat "$built"/out/* | sha256sum | cut -c1-16)
  e2e/cluster build-images "$built" || return
  rm -rf "$built"
}

# install_operator [HELM-OPTION...]
install_operator() {
  kubectl create namespace podcheckpoint-system --dry-run=client -o yaml | kubectl apply -f - > /dev/null
  kubectl label namespace podcheckpoint-system pod-security.kubernetes.io/enforce=privileged --overwrite > /dev/null
  helm upgrade --install podcheckpoint charts/podcheckpoint --namespace podcheckpoint-system --wait --timeout 120s \
    --set controller.image.repository="${PODCHECKPOINT_IMAGE_PREFIX:-localhost}/podcheckpoint-controller" \
    --set agent.image.repository="${PODCHECKPOINT_IMAGE_PREFIX:-localhost}/podcheckpoint-agent" \
    --set controller.image.tag="${PODCHECKPOINT_IMAGE_TAG:-dev}" --set agent.image.tag="${PODCHECKPOINT_IMAGE_TAG:-dev}" \
    --set-string controller.podAnnotations.build="${PODCHECKPOINT_BUILD:-unknown}" "$@" > /dev/null || return
  # Agents of an earlier build would stay until they are idle.
  kubectl delete pod --namespace podcheckpoint-system --selector app.kubernetes.io/component=agent --wait --timeout=180s > /dev/null
}
