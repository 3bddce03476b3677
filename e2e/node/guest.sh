# shellcheck shell=bash
# The second node: a virtual machine with a kernel of its own (cgroup v2, Yama, AppArmor or SELinux). Sourced by
# e2e/cluster.
# shellcheck disable=SC2154 # the variables are e2e/cluster's

guest_address() { echo "10.89.$(slot).2"; }
guest_gateway() { echo "10.89.$(slot).1"; }
guest_pods=10.244.1.0/24

# --- parts ---------------------------------------------------------------------------------------------------------

# The initramfs only has to find the disk: with every driver in it, emulated code unpacks it for many seconds.
make_guest_rootfs() {
  debootstrap --variant=minbase --include="$packages,$guest_packages" trixie "$1"
  printf 'MODULES=list\nBUSYBOX=n\nFSTYPE=ext4\nRESUME=none\n' > "$1/etc/initramfs-tools/conf.d/node2"
  printf 'virtio_pci\nvirtio_blk\next4\n' >> "$1/etc/initramfs-tools/modules"
  chroot "$1" update-initramfs -u
  rm -rf "$1"/var/cache/apt/archives/*.deb "$1"/var/lib/apt/lists/* "$1"/etc/ssh/ssh_host_*
  printf 'UsePAM no\nUseDNS no\n' > "$1/etc/ssh/sshd_config.d/node2.conf"
}
guest_rootfs=$(part guest-rootfs "trixie $packages,$guest_packages $(declare -f make_guest_rootfs)")

# The tree is made of links to the root filesystem's files, so nothing here may write into an existing file.
make_guest_disk() {
  local tree=$1/tree
  cp -al "$guest_rootfs" "$tree"
  mkdir -p "$tree/opt/bin" "$tree/etc/containerd" "$tree/var/lib/podcheckpoint"
  cp -a --remove-destination "$kubernetes/bin/." "$containerd/bin/." "$data/node2" "$data/keep" "$tree/opt/bin/"
  cp --remove-destination "$data/containerd.toml" "$tree/etc/containerd/config.toml"
  cc -static -Os -o "$tree/opt/bin/hold-perf" "$data/hold-perf.c"
  cp "$tree"/boot/vmlinuz-* "$1/vmlinuz"
  cp "$tree"/boot/initrd.img-* "$1/initrd"
  mkfs.ext4 -q -d "$tree" "$1/disk" 8G
  rm -rf "$tree"
}
guest_disk=$(part guest-disk "$guest_rootfs $kubernetes $containerd $(cat "$data"/{node2,keep,containerd.toml,hold-perf.c}) \
$(declare -f make_guest_disk)")

prepare_guest() {
  need_packages qemu-system-x86_64:qemu-system-x86 mkfs.ext4:e2fsprogs ssh:openssh-client secilc:secilc
  [ -c /dev/net/tun ] || fail "/dev/net/tun is missing: the second node is a virtual machine behind a tap and needs it"
  make_part guest-rootfs "$guest_rootfs" make_guest_rootfs
  make_part guest-disk "$guest_disk" make_guest_disk
}

# --- the machine ---------------------------------------------------------------------------------------------------

guest_pid() { cat "$state/node2.pid" 2> /dev/null; }
guest_runs() {
  local pid
  pid=$(guest_pid) && tr '\0' ' ' < "/proc/$pid/cmdline" 2> /dev/null | grep -qF "$state/node2.disk"
}

# AppArmor and SELinux exclude each other.
guest_lsm() { sed 's/.*, lsm //' "$state/fixture"; }

make_guest_network() {
  local net
  net=$(network)
  ip -n "$net" link show tap0 > /dev/null 2>&1 || ip -n "$net" tuntap add tap0 mode tap
  ip -n "$net" addr replace "$(guest_gateway)/24" dev tap0
  ip -n "$net" link set tap0 up
  ip -n "$net" route replace "$guest_pods" via "$(guest_address)"
  ip route replace "10.89.$(slot).0/24" via "$(address)" dev "$net"
}

# What makes the machine a node of this cluster and not of another, as the tar that is its second disk.
make_guest_settings() {
  local pki=$state/pki tree=$state/node2
  certificate kubelet-node2 "/O=system:nodes/CN=system:node:node2" "DNS:node2,IP:$(guest_address)"
  certificate proxy "/CN=system:kube-proxy"
  kubeconfig kubelet-node2 "$(address)"
  kubeconfig proxy "$(address)"
  rm -rf "$tree" "$state"/ssh-*
  ssh-keygen -q -t ed25519 -N '' -C node2 -f "$state/ssh-host"
  ssh-keygen -q -t ed25519 -N '' -C "$name" -f "$state/ssh-user"
  echo "$(guest_address) $(cut -d' ' -f1,2 "$state/ssh-host.pub")" > "$state/ssh-known-hosts"

  mkdir -p "$tree"/etc/{kubernetes/pki,kubernetes/manifests,cni/net.d,ssh} "$tree"/root/.ssh
  printf 'address=%s\ngateway=%s\n' "$(guest_address)" "$(guest_gateway)" > "$tree/etc/kubernetes/node2.env"
  cp "$pki/ca.crt" "$tree/etc/kubernetes/pki/ca.crt"
  cp "$pki/kubelet-node2.crt" "$tree/etc/kubernetes/pki/kubelet.crt"
  cp "$pki/kubelet-node2.key" "$tree/etc/kubernetes/pki/kubelet.key"
  cp "$pki/kubelet-node2.kubeconfig" "$tree/etc/kubernetes/kubelet.kubeconfig"
  cp "$pki/proxy.kubeconfig" "$tree/etc/kubernetes/proxy.kubeconfig"
  # The machine's hierarchy is its own: no cgroup root to tell two instances apart.
  sed "s#@CGROUP_ROOT@#/#; s#@POD_CIDR@#$guest_pods#" "$data/kubelet.yaml" > "$tree/etc/kubernetes/kubelet.yaml"
  sed "s#@POD_CIDR@#$guest_pods#" "$data/bridge.conflist" > "$tree/etc/cni/net.d/10-bridge.conflist"
  cp "$state/ssh-host" "$tree/etc/ssh/ssh_host_ed25519_key"
  cp "$state/ssh-user.pub" "$tree/root/.ssh/authorized_keys"
  chmod 700 "$tree/root" "$tree/root/.ssh"
  # node2 loads a policy if there is one.
  [ "$(guest_lsm)" != selinux ] || secilc -o "$tree/etc/kubernetes/selinux.policy" -f /dev/null "$data/selinux.cil"
  tar -c -f "$state/node2.tar" --owner=0 --group=0 -C "$tree" etc/kubernetes etc/cni etc/ssh/ssh_host_ed25519_key root/.ssh
}

# Its disk is a copy of the cached one, which goes with the cluster. Not a layer over it: qemu keeps a layer's own tables
# in memory, and they would be lost when it is killed.
copy_guest_disk() { cp --sparse=always --reflink=auto "$guest_disk/disk" "$state/node2.disk"; }

# The machine is in the cluster's network namespace, started detached as node1 is.
start_guest() {
  rm -f "$state/node2.pid"
  nsenter --net="/run/netns/$(network)" setsid qemu-system-x86_64 -name "$name-node2" -accel tcg,thread=multi -cpu max \
    -smp 2 -m 2048 -display none -monitor none -no-reboot -pidfile "$state/node2.pid" \
    -serial "file:$state/node2-console.log" -kernel "$guest_disk/vmlinuz" -initrd "$guest_disk/initrd" \
    -append "console=ttyS0 root=/dev/vda rw fsck.mode=skip init=/opt/bin/node2 quiet panic=-1 net.ifnames=0 \
lsm=landlock,lockdown,yama,$(guest_lsm),bpf" \
    -drive "file=$state/node2.disk,format=raw,if=virtio,cache=unsafe" \
    -drive "file=$state/node2.tar,format=raw,if=virtio,readonly=on" -device virtio-rng-pci \
    -netdev tap,id=net,ifname=tap0,script=no,downscript=no -device virtio-net-pci,netdev=net \
    < /dev/null > "$state/node2-qemu.log" 2>&1 8>&- 9>&- &
  wait_for 10 "node2's start" guest_runs
}

guest_answers() { guest_runs && run_node2 true < /dev/null; }
guest_containerd_answers() { run_node2 ctr version < /dev/null; }
guest_images() {
  load_node2 "$static"/*.tar
  local image
  for image in "$state"/images/podcheckpoint-*.tar; do
    [ ! -e "$image" ] || load_node2 "$image"
  done
}

wait_for_guest() {
  wait_for 120 "node2's answer" guest_answers
  wait_for 60 "the answer of node2's containerd" guest_containerd_answers
}

# As if the power had failed: nothing in the machine is told.
reboot_node2() {
  guest_runs || fail "node2 does not run: e2e/cluster up --nodes 2"
  local booted
  booted=$(run_node2 cat /proc/sys/kernel/random/boot_id < /dev/null)
  end_guest
  start_guest
  wait_for_guest
  [ "$(run_node2 cat /proc/sys/kernel/random/boot_id < /dev/null)" != "$booted" ] || fail "node2 was not started again"
  # The API server takes the node for ready until its lease has run out, and again when its kubelet has come back.
  wait_for 120 "node2 Ready" guest_is_back
}

guest_is_back() {
  [ "$(kubectl get node node2 -o 'jsonpath={.status.nodeInfo.bootID}')" = \
    "$(run_node2 cat /proc/sys/kernel/random/boot_id < /dev/null)" ] && node_is_ready node2
}

up_node2() {
  local started=$SECONDS
  if guest_runs; then
    say "node2 runs already"
  else
    say "starting node2, a virtual machine without hardware help, at $(guest_address)"
    down_node2
    make_guest_network
    make_guest_settings
    copy_guest_disk
    start_guest
    wait_for_guest
    guest_images
  fi
  wait_for 120 "node2 Ready" node_is_ready node2
  say "node2 is ready after $((SECONDS - started)) s"
}

end_guest() {
  local pid
  pid=$(guest_pid)
  # One connection is kept for all commands; it ends with the machine, but only after a timeout.
  guest_ssh -O exit 2> /dev/null || true
  kill -KILL "$pid" 2> /dev/null || true
  while [ -d "/proc/$pid" ]; do sleep 0.1; done
}

down_node2() {
  if guest_runs; then end_guest; fi
  if [ -e "$state/slot" ]; then ip -n "$(network)" link del tap0 2> /dev/null || true; fi
  rm -rf "$state"/node2 "$state"/node2[.-]* "$state"/ssh-*
}

# --- commands in it ------------------------------------------------------------------------------------------------

# One connection serves all commands: the key exchange alone takes emulated code a second. The socket's path is
# relative because an absolute one may be longer than a socket's name can be.
guest_ssh() {
  (cd "$state" && ssh -q -F none -i ssh-user -o UserKnownHostsFile=ssh-known-hosts -o StrictHostKeyChecking=yes \
    -o IdentitiesOnly=yes -o BatchMode=yes -o ConnectTimeout=5 -o KexAlgorithms=curve25519-sha256 \
    -o Ciphers=aes128-gcm@openssh.com -o ControlMaster=auto -o ControlPath=ssh-socket -o ControlPersist=600 \
    "$@" "root@$(guest_address)" ${guest_command:+"$guest_command"})
}

run_node2() {
  guest_runs || fail "node2 does not run: e2e/cluster up --nodes 2"
  local guest_command options=()
  guest_command=$(printf '%q ' env -i PATH=/opt/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM="${TERM:-dumb}" "$@")
  [ ! -t 0 ] || options=(-t)
  guest_ssh "${options[@]}"
}

load_node2() {
  local file
  for file in "$@"; do run_node2 ctr -n k8s.io images import - < "$file" > /dev/null; done
}
