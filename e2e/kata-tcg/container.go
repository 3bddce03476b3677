package main

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/types"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/fifo"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"podcheckpoint.dev/e2e/kata-tcg/wire"
)

// container is one of the pod's; the sandbox itself is one too.
type container struct {
	id, bundle string
	sandbox    bool
	spec       *specs.Spec
	process    *process
	execs      map[string]*process
}

// carryIn copies the root filesystem and what the kubelet mounts into the guest, and rewrites the specification for it.
func (c *container) carryIn(m *machine, rootfs []*types.Mount) error {
	target := filepath.Join(c.bundle, "rootfs")
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := mount.All(mount.FromProto(rootfs), target); err != nil {
		return err
	}
	defer mount.UnmountRecursive(target, 0)
	inside := filepath.Join("/run/kata-containers", c.id)
	if err := m.copyIn(target, ".", filepath.Join(inside, "rootfs")); err != nil {
		return err
	}
	for number, mounted := range c.spec.Mounts {
		if mounted.Type != "bind" {
			continue
		}
		place, err := carryMount(m, mounted.Source, filepath.Join(inside, "mounts", string(rune('a'+number))))
		if err != nil {
			return err
		}
		c.spec.Mounts[number].Source = place
	}
	adapt(c.spec, c.id)
	return nil
}

// carryMount copies a file or a folder, as Kata does without a shared filesystem. It is a copy: what changes later on
// the node is not seen in the guest.
func carryMount(m *machine, source, into string) (string, error) {
	info, err := os.Stat(source)
	if err != nil {
		return "", err
	}
	if info.IsDir() {
		return into, m.copyIn(source, ".", into)
	}
	return filepath.Join(into, filepath.Base(source)), m.copyIn(filepath.Dir(source), filepath.Base(source), into)
}

// Whether the node's seccomp profiles are used in the guest, which they are not unless this is "false".
const seccompAnnotation = "io.katacontainers.config.runtime.disable_guest_seccomp"

// adapt takes out what belongs to the node: the guest is the pod's, and confines by being one.
func adapt(spec *specs.Spec, id string) {
	spec.Root.Path = "rootfs"
	spec.Hooks = nil
	confineless(spec.Process)
	linux := spec.Linux
	linux.CgroupsPath = "/" + id
	linux.Resources, linux.Sysctl, linux.MountLabel = nil, nil, ""
	if spec.Annotations[seccompAnnotation] != "false" {
		linux.Seccomp = nil
	}
	var own []specs.LinuxNamespace
	for _, namespace := range linux.Namespaces {
		switch namespace.Type {
		case specs.NetworkNamespace, specs.UserNamespace:
		default:
			own = append(own, specs.LinuxNamespace{Type: namespace.Type})
		}
	}
	linux.Namespaces = own
	linux.UIDMappings, linux.GIDMappings = nil, nil
}

// confineless takes out the node's profiles: Kata's guests have none either.
func confineless(process *specs.Process) {
	process.ApparmorProfile, process.SelinuxLabel, process.OOMScoreAdj = "", "", nil
	process.Terminal = false
}

// process is one in the guest, as containerd sees it.
type process struct {
	paths    [3]string
	spec     *specs.Process
	mu       sync.Mutex
	state    tasktypes.Status
	stdin    io.Closer
	exited   chan struct{}
	code     uint32
	exitedAt time.Time
}

func newProcess(stdin, stdout, stderr string) *process {
	return &process{
		paths: [3]string{stdin, stdout, stderr}, state: tasktypes.Status_CREATED, exited: make(chan struct{}),
	}
}

func (p *process) status() tasktypes.Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state
}

func (p *process) begun() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.state = tasktypes.Status_RUNNING
}

func (p *process) pause(paused bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.state = tasktypes.Status_RUNNING
	if paused {
		p.state = tasktypes.Status_PAUSED
	}
}

func (p *process) finish(code uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state == tasktypes.Status_STOPPED {
		return
	}
	p.state, p.code, p.exitedAt = tasktypes.Status_STOPPED, code, time.Now()
	close(p.exited)
}

func (p *process) closeStdin() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stdin != nil {
		p.stdin.Close()
	}
}

// start ties the pipes that containerd has made to the process in the guest, and starts it. `ended` is called once.
func (p *process) start(ctx context.Context, m *machine, request wire.Request, ended func(code uint32)) error {
	outputs, err := p.connect(m, request)
	if err != nil {
		return err
	}
	talk, err := m.open(request)
	if err != nil {
		return err
	}
	if _, err := talk.reply(); err != nil {
		talk.Close()
		return err
	}
	p.begun()
	go func() {
		defer talk.Close()
		reply, err := talk.reply()
		if err != nil {
			reply.Code = 255
		}
		outputs.Wait()
		ended(reply.Code)
	}()
	return nil
}

// connect opens a stream for each pipe; what it gives is done when all output has been handed on.
func (p *process) connect(m *machine, request wire.Request) (*sync.WaitGroup, error) {
	var outputs sync.WaitGroup
	for fd, path := range p.paths {
		if path == "" {
			continue
		}
		stdio := wire.Request{Op: "stdio", ID: request.ID, Exec: request.Exec, Fd: fd}
		talk, err := m.open(stdio)
		if err != nil {
			return nil, err
		}
		if _, err := talk.reply(); err != nil {
			return nil, err
		}
		flags := syscall.O_WRONLY
		if fd == 0 {
			flags = syscall.O_RDONLY
		}
		pipe, err := fifo.OpenFifo(context.Background(), path, flags, 0)
		if err != nil {
			return nil, err
		}
		if fd == 0 {
			p.stdin = pipe
			go func() {
				io.Copy(talk.Stream, pipe)
				talk.Close()
			}()
			continue
		}
		// As containerd's own shim does: a reader that has gone away for a moment must not end the pipe.
		other, err := fifo.OpenFifo(context.Background(), path, syscall.O_RDONLY, 0)
		if err != nil {
			return nil, err
		}
		outputs.Add(1)
		go func() {
			defer outputs.Done()
			io.Copy(pipe, talk)
			pipe.Close()
			other.Close()
			talk.Close()
		}()
	}
	return &outputs, nil
}
