// Command containerd-shim-kata-tcg-v2 runs pods in virtual machines without hardware help, for tests: a sandbox is a
// QEMU machine (TCG) with a kernel of its own, and its containers run in it, as Kata does it. It is slow, has no network
// and no terminals, and nothing but tests should use it.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

const name = "io.containerd.kata-tcg.v2"

func init() {
	registry.Register(&plugin.Registration{
		Type:     plugins.TTRPCPlugin,
		ID:       "task",
		Requires: []plugin.Type{plugins.EventPlugin, plugins.InternalPlugin},
		InitFn: func(ic *plugin.InitContext) (any, error) {
			publisher, err := ic.GetByID(plugins.EventPlugin, "publisher")
			if err != nil {
				return nil, err
			}
			stop, err := ic.GetByID(plugins.InternalPlugin, "shutdown")
			if err != nil {
				return nil, err
			}
			return newService(ic.Context, publisher.(shim.Publisher), stop.(shutdown.Service)), nil
		},
	})
}

func main() {
	if len(os.Args) == 4 && os.Args[1] == "exec" {
		status, err := execute(os.Args[2], os.Args[3])
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			status = 125
		}
		os.Exit(status)
	}
	shim.RunShim(context.Background(), manager{}, func(config *shim.Config) {
		// Every child is waited for by who started it.
		config.NoReaper, config.NoSubreaper = true, true
	})
}

// manager starts one shim for each sandbox.
type manager struct{}

func (manager) Name() string { return name }

func readSpec(bundle string) (*specs.Spec, error) {
	content, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err != nil {
		return nil, err
	}
	var spec specs.Spec
	return &spec, json.Unmarshal(content, &spec)
}

func (manager) Start(ctx context.Context, parameters *bootapi.BootstrapParams) (*bootapi.BootstrapResult, error) {
	namespace, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return nil, err
	}
	spec, err := readSpec(".")
	if err != nil {
		return nil, err
	}
	group := parameters.GetInstanceID()
	if sandbox := spec.Annotations[sandboxAnnotation]; sandbox != "" {
		group = sandbox
	}
	folder := parameters.GetSocketDir()
	if folder == "" {
		folder = filepath.Join(defaults.DefaultStateDir, "s")
	}
	address, err := shim.CreateSocketAddress(ctx, folder, parameters.GetContainerdGrpcAddress(), group, false)
	if err != nil {
		return nil, err
	}
	result := &bootapi.BootstrapResult{Version: 3, Protocol: "ttrpc", Address: address}
	socket, err := shim.NewSocket(address)
	if shim.SocketEaddrinuse(err) {
		if shim.CanConnect(address) {
			return result, nil
		}
		if err := shim.RemoveSocket(address); err != nil {
			return nil, err
		}
		socket, err = shim.NewSocket(address)
	}
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	file, err := socket.File()
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	command := exec.Command(self, "-namespace", namespace, "-id", parameters.GetInstanceID(),
		"-address", parameters.GetContainerdGrpcAddress())
	command.ExtraFiles = []*os.File{file}
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := command.Start(); err != nil {
		shim.RemoveSocket(address)
		return nil, err
	}
	go command.Wait()
	return result, nil
}

// Stop cleans up after a shim that is gone.
func (manager) Stop(ctx context.Context, id string) (shim.StopStatus, error) {
	working, err := os.Getwd()
	if err != nil {
		return shim.StopStatus{}, err
	}
	pid := endMachine(id)
	mount.UnmountRecursive(filepath.Join(filepath.Dir(working), id, "rootfs"), 0)
	return shim.StopStatus{Pid: pid, ExitStatus: 128 + int(syscall.SIGKILL), ExitedAt: time.Now()}, nil
}

func (manager) Info(context.Context, io.Reader) (*types.RuntimeInfo, error) {
	return &types.RuntimeInfo{Name: name, Version: &types.RuntimeVersion{Version: "test"}}, nil
}
