# shellcheck shell=bash
# Pods in gVisor on node1: the parts of the RuntimeClass gvisor. Sourced by e2e/cluster.
# shellcheck disable=SC2154 # the variables are e2e/cluster's

# runsc as Debian 13 has it, and gVisor's own shim, which Debian does not package, built from the source of that package.
make_gvisor() {
  local tree=$1/tree apt=$1/apt
  mkdir -p "$1/bin" "$tree" "$apt"/{lists/partial,cache/archives/partial}
  chmod -R a+rX "$1"
  # This machine may be another Debian, so apt gets lists of its own.
  local key=/usr/share/keyrings/debian-archive-keyring.gpg kind
  for kind in deb deb-src; do echo "$kind [signed-by=$key] http://deb.debian.org/debian trixie main"; done > "$apt/sources.list"
  cat > "$apt/apt.conf" << EOF
Dir::State::lists "$apt/lists";
Dir::Cache "$apt/cache";
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::State::status "/dev/null";
APT::Sandbox::User "root";
EOF
  export APT_CONFIG=$apt/apt.conf
  apt-get update
  # Only the original source is needed; not every mirror has the description beside it.
  (cd "$apt" && apt-get download runsc && { apt-get source --download-only golang-gvisor-gvisor || [ -s golang-gvisor-gvisor_*.orig.tar.gz ]; })
  dpkg-deb -x "$apt"/runsc_*.deb "$apt/runsc"
  cp "$apt/runsc/usr/bin/runsc" "$1/bin/"
  tar xf "$apt"/golang-gvisor-gvisor_*.orig.tar.gz -C "$tree" --strip-components=1
  (cd "$tree" && make_gvisor_shim "$1/bin")
  rm -rf "$tree" "$apt"
}

make_gvisor_shim() {
  # As debian/rules does it: the shim holds gVisor's kernel too, which reads its vDSO when it starts.
  c++ -I. -O2 -std=c++11 -fPIC -fno-sanitize=all -fno-stack-protector -shared -nostdlib -Wl,-soname=linux-vdso.so.1 \
    -Wl,--hash-style=sysv -Wl,--no-undefined -Wl,-Bsymbolic -Wl,-z,max-page-size=4096 -Wl,-z,common-page-size=4096 \
    -Wl,-Tvdso/vdso_amd64.lds -o pkg/sentry/loader/vdsodata/vdso_amd64.so vdso/vdso.cc vdso/vdso_time.cc
  # A build machine without CAP_SYS_RESOURCE cannot lower an oom_score_adj: containerd's +1 in place of -999.
  sed -i 's/shim\.SetScore(/shim.AdjustOOMScore(/' pkg/shim/service.go
  GOFLAGS=-mod=mod CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o "$1/containerd-shim-runsc-v1" ./shim
}
gvisor=$(part gvisor "trixie $(declare -f make_gvisor make_gvisor_shim)")

prepare_gvisor() {
  need_packages c++:g++
  make_part gvisor "$gvisor" make_gvisor
}

fill_gvisor() {
  local root=$state/root
  cp "$gvisor/bin/runsc" "$root/usr/bin/"
  cp "$gvisor/bin/containerd-shim-runsc-v1" "$root/opt/bin/"
  cp "$data/gvisor/runsc.toml" "$root/etc/containerd/runsc.toml"
  cat "$data/gvisor/containerd.toml" >> "$root/etc/containerd/config.toml"
}
