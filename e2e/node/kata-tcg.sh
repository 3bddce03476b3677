# shellcheck shell=bash
# Pods in virtual machines on node1: the parts of the RuntimeClass kata-tcg. Sourced by e2e/cluster.
# shellcheck disable=SC2154 # the variables are e2e/cluster's and guest.sh's

vsock_version=0.3.0
vsock=$(part vsock "$vsock_version")
# Hybrid vsock without the kernel's own, which few build machines have.
make_vsock() {
  CARGO_TARGET_DIR=$1/target cargo install --quiet --locked --root "$1" "vhost-device-vsock@$vsock_version"
  rm -rf "$1/target"
}

# What the machines have beside a busybox: what a checkpoint in the guest needs, and what it is compared with.
kata_programs="/usr/sbin/criu /usr/bin/crun /usr/bin/strace /usr/bin/tar"
kata_modules="virtio_pci virtio_blk virtio_console virtio_rng ext4 vmw_vsock_virtio_transport unix_diag inet_diag tcp_diag \
udp_diag netlink_diag af_packet_diag overlay tun veth nf_tables nft_ct"

make_kata_disk() {
  local tree=$1 applet program library
  mkdir -p "$tree"/{bin,sbin,usr/bin,usr/sbin,proc,sys,dev,run,tmp,root,etc,var/lib}
  ln -s ../run "$tree/var/run"
  cp "$rootfs/bin/busybox" "$tree/bin/busybox"
  for applet in $("$tree/bin/busybox" --list); do [ "$applet" = busybox ] || ln -s busybox "$tree/bin/$applet"; done
  for program in $kata_programs; do
    cp "$guest_rootfs$program" "$tree$program"
    for library in $(chroot "$guest_rootfs" ldd "$program" | grep -o '/[^ ]*'); do
      mkdir -p "$tree$(dirname "$library")"
      cp -L "$guest_rootfs$library" "$tree$library"
    done
  done
  echo 'root:x:0:0:root:/root:/bin/sh' > "$tree/etc/passwd"
}

make_kata_initramfs() {
  local tree=$1 release number=100 module modules
  release=$(basename "$guest_rootfs"/lib/modules/*)
  mkdir -p "$tree"/{proc,sys,dev,root,modules}
  modules=$(for module in $kata_modules; do
    chroot "$guest_rootfs" modprobe -S "$release" --show-depends "$module" 2> /dev/null || true
  done | awk '$1 == "insmod" && !seen[$2]++ {print $2}')
  for module in $modules; do
    number=$((number + 1))
    xz -dc "$guest_rootfs$module" > "$tree/modules/$number-$(basename "${module%.xz}")"
  done
}

make_kata() {
  mkdir -p "$1"/{bin,initramfs,tree}
  (cd "$project/e2e/kata-tcg" && CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o "$1/bin/containerd-shim-kata-tcg-v2" . &&
    CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o "$1/initramfs/init" ./guest)
  cp "$guest_rootfs"/boot/vmlinuz-* "$1/vmlinuz"
  make_kata_initramfs "$1/initramfs"
  (cd "$1/initramfs" && find . | "$rootfs/bin/busybox" cpio -o -H newc > "$1/initrd")
  make_kata_disk "$1/tree"
  mkfs.ext4 -q -O ^has_journal -d "$1/tree" "$1/disk" 128M
  rm -rf "$1/tree" "$1/initramfs"
}
kata=$(part kata-tcg "$rootfs $guest_rootfs $kata_programs $kata_modules $(cat "$project"/e2e/kata-tcg/{go.mod,*.go,*/*.go}) \
$(declare -f make_kata make_kata_disk make_kata_initramfs)")

prepare_kata() {
  command -v cargo > /dev/null || fail "cargo is missing: it builds the machines' vsock device"
  need_packages mkfs.ext4:e2fsprogs xz:xz-utils
  make_part guest-rootfs "$guest_rootfs" make_guest_rootfs
  make_part vsock "$vsock" make_vsock
  make_part kata-tcg "$kata" make_kata
}

# The kernel and the disk are only read, so all machines share them.
fill_kata() {
  local root=$state/root
  mkdir -p "$root/opt/kata-tcg"
  cp "$kata/bin/containerd-shim-kata-tcg-v2" "$vsock/bin/vhost-device-vsock" "$root/opt/bin/"
  cp --reflink=auto "$kata"/{vmlinuz,initrd} "$root/opt/kata-tcg/"
  cp --sparse=always --reflink=auto "$kata/disk" "$root/opt/kata-tcg/disk"
  cp "$data"/kata-tcg/*.toml "$root/opt/kata-tcg/"
  cat "$data/kata-tcg.toml" >> "$root/etc/containerd/config.toml"
}
