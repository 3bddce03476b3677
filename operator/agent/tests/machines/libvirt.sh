#!/bin/bash
# A libvirtd of the tests' own, beside any other: in a mount namespace of its own, with its own folders and users. Ends
# with its standard input. Usage: unshare --mount libvirt.sh FOLDER DOMAIN-XML
set -euo pipefail
folder=$1 domain=$2

mkdir -p "$folder/etc"
cp -a /etc/libvirt/. "$folder/etc/"
cp /etc/passwd /etc/group "$folder/"
grep -q ^libvirt-qemu: "$folder/passwd" || echo 'libvirt-qemu:x:64055:64055::/:/bin/false' >> "$folder/passwd"
grep -q ^libvirt-qemu: "$folder/group" || echo 'libvirt-qemu:x:64055:' >> "$folder/group"
# A libvirtd that has never run has not made all of them.
for place in /run /var/lib/libvirt /var/cache/libvirt /var/log; do
  mkdir -p "$place"
  mount -t tmpfs libvirt-test "$place"
done
mkdir -p /run/libvirt /var/log/libvirt/qemu /var/lib/libvirt/qemu /var/cache/libvirt/qemu
mount --bind "$folder/etc" /etc/libvirt
mount --bind "$folder/passwd" /etc/passwd
mount --bind "$folder/group" /etc/group
cat > /etc/libvirt/qemu.conf << 'X'
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
seccomp_sandbox = 0
stdio_handler = "file"
X
echo 'auth_unix_rw = "none"' > /etc/libvirt/libvirtd.conf

libvirtd > "$folder/libvirtd.log" 2>&1 &
daemon=$!
trap 'virsh --connect qemu:///system destroy shop_vm > /dev/null 2>&1 || true; kill $daemon' EXIT
for ((i = 0; i < 300; i++)); do
  virsh --connect qemu:///system version > /dev/null 2>&1 && break
  sleep 0.1
done
virsh --connect qemu:///system create "$domain" >&2
# Each line is a command of virsh, until there are no more.
while read -r line; do
  # shellcheck disable=SC2086 # words
  virsh --quiet --connect qemu:///system $line 2>&1 || true
  echo "done"
done
