package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/hashicorp/yamux"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/pelletier/go-toml/v2"

	"podcheckpoint.dev/e2e/kata-tcg/wire"
)

// machines is where Kata has the sockets of its machines; assets is where this test's kernel and disk are.
const (
	machines = "/run/vc/vm"
	assets   = "/opt/kata-tcg"
	bootTime = 90 * time.Second
)

// kernelParametersAnnotation is one of those that a stock Kata allows in a pod.
const kernelParametersAnnotation = "io.katacontainers.config.hypervisor.kernel_params"

// configuration is the part of Kata's that this test knows, in Kata's words, and how the console is reached.
type configuration struct {
	Hypervisor struct {
		Qemu struct {
			Memory              int    `toml:"default_memory"`
			ExtraMonitorSocket  string `toml:"extra_monitor_socket"`
			KernelParams        string `toml:"kernel_params"`
			ConsoleOnSerialPort bool   `toml:"podcheckpoint_console_on_serial_port"`
			Carried             string `toml:"podcheckpoint_carried"`
		} `toml:"qemu"`
	} `toml:"hypervisor"`
	Agent struct {
		Kata struct {
			DebugConsole bool `toml:"debug_console_enabled"`
		} `toml:"kata"`
	} `toml:"agent"`
}

func readConfiguration(path string) (configuration, error) {
	var read configuration
	read.Hypervisor.Qemu.Memory = 512
	if path == "" {
		path = filepath.Join(assets, "configuration.toml")
	}
	content, err := os.ReadFile(path)
	if err != nil {
		return read, err
	}
	return read, toml.Unmarshal(content, &read)
}

// machine is one QEMU with what belongs to it.
type machine struct {
	id      string
	pid     int
	session *yamux.Session
	monitor net.Conn
	cgroup  cgroup1.Cgroup
	ended   chan struct{}
}

func startMachine(ctx context.Context, id string, spec *specs.Spec, settings configuration) (*machine, error) {
	folder := filepath.Join(machines, id)
	if err := os.MkdirAll(folder, 0o750); err != nil {
		return nil, err
	}
	m := &machine{id: id, ended: make(chan struct{})}
	if err := m.launch(ctx, folder, spec, settings); err != nil {
		endMachine(id)
		return nil, err
	}
	return m, nil
}

func (m *machine) launch(ctx context.Context, folder string, spec *specs.Spec, settings configuration) error {
	log, err := os.OpenFile(filepath.Join(folder, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	if !settings.Hypervisor.Qemu.ConsoleOnSerialPort {
		device := exec.Command("vhost-device-vsock", "--guest-cid", contextID(m.id), "--socket",
			filepath.Join(folder, "vhu.sock"), "--uds-path", filepath.Join(folder, "kata.hvsock"))
		device.Stdout, device.Stderr = log, log
		if err := start(device, filepath.Join(folder, "vsock.pid")); err != nil {
			return err
		}
		go device.Wait()
		if err := await(ctx, filepath.Join(folder, "vhu.sock")); err != nil {
			return err
		}
	}
	qemu := exec.Command("qemu-system-x86_64", arguments(m.id, folder, spec, settings)...)
	qemu.Stdout, qemu.Stderr = log, log
	if err := start(qemu, filepath.Join(folder, "pid")); err != nil {
		return err
	}
	m.pid = qemu.Process.Pid
	go func() {
		qemu.Wait()
		close(m.ended)
	}()
	if m.cgroup, err = join(spec, m.pid); err != nil {
		return err
	}
	if err := await(ctx, filepath.Join(folder, "agent.sock")); err != nil {
		return err
	}
	// As Kata's runtime does: it keeps the one client that the monitor serves.
	if m.monitor, err = net.Dial("unix", filepath.Join(folder, "qmp.sock")); err != nil {
		return err
	}
	io.WriteString(m.monitor, "{\"execute\":\"qmp_capabilities\"}\n")
	go io.Copy(io.Discard, m.monitor)
	connection, err := net.Dial("unix", filepath.Join(folder, "agent.sock"))
	if err != nil {
		return err
	}
	if m.session, err = yamux.Client(connection, wire.Config()); err != nil {
		return err
	}
	return m.answers(ctx)
}

// answers waits for the agent in the machine.
func (m *machine) answers(ctx context.Context) error {
	answered := make(chan error, 1)
	go func() { answered <- m.ask(wire.Request{Op: "ping"}) }()
	select {
	case err := <-answered:
		return err
	case <-m.ended:
		return errors.New("the machine ended while it booted: see " + filepath.Join(machines, m.id))
	case <-time.After(bootTime):
		return fmt.Errorf("the machine's agent does not answer within %s", bootTime)
	case <-ctx.Done():
		return ctx.Err()
	}
}

func arguments(id, folder string, spec *specs.Spec, settings configuration) []string {
	qemu := settings.Hypervisor.Qemu
	kernel := []string{"console=ttyS0 quiet panic=-1 rdinit=/init", qemu.KernelParams}
	if settings.Agent.Kata.DebugConsole {
		kernel = append(kernel, "agent.debug_console agent.debug_console_vport=1026")
	}
	kernel = append(kernel, spec.Annotations[kernelParametersAnnotation])
	socket := func(name string) string { return filepath.Join(folder, name) }
	all := []string{
		"-name", "sandbox-" + id, "-machine", "q35,memory-backend=mem0", "-accel", "tcg", "-cpu", "max",
		"-m", strconv.Itoa(qemu.Memory),
		"-object", fmt.Sprintf("memory-backend-memfd,id=mem0,size=%dM,share=on", qemu.Memory),
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-serial", "file:" + socket("console.log"),
		"-kernel", assets + "/vmlinuz", "-initrd", assets + "/initrd", "-append", strings.Join(kernel, " "),
		"-drive", "id=root,file=" + assets + "/disk,format=raw,if=none,readonly=on",
		"-device", "virtio-blk-pci,drive=root", "-device", "virtio-rng-pci",
		"-qmp", "unix:" + socket("qmp.sock") + ",server=on,wait=off",
		"-device", "virtio-serial-pci",
		"-chardev", "socket,id=agent,path=" + socket("agent.sock") + ",server=on,wait=off",
		"-device", "virtserialport,chardev=agent,name=" + wire.Port,
	}
	// Programs that the guest's image carries, as a tar that takes the place of a disk.
	if _, err := os.Stat(qemu.Carried); err == nil {
		all = append(all, "-drive", "id=carried,file="+qemu.Carried+",format=raw,if=none,readonly=on",
			"-device", "virtio-blk-pci,drive=carried")
	}
	if qemu.ExtraMonitorSocket == "qmp" {
		all = append(all, "-qmp", "unix:"+socket("extra-monitor.sock")+",server=on,wait=off")
	}
	if qemu.ConsoleOnSerialPort {
		return append(all, "-chardev", "socket,id=console,path="+socket("console.sock")+",server=on,wait=off",
			"-device", "virtserialport,chardev=console,name="+wire.ConsolePort)
	}
	return append(all, "-chardev", "socket,id=vsock,path="+socket("vhu.sock"), "-device", "vhost-user-vsock-pci,chardev=vsock")
}

// contextID is a guest's address on vsock. With vhost-user it needs to differ only from the reserved ones.
func contextID(string) string { return "3" }

func start(command *exec.Cmd, pidFile string) error {
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := command.Start(); err != nil {
		return err
	}
	return os.WriteFile(pidFile, []byte(strconv.Itoa(command.Process.Pid)), 0o600)
}

func await(ctx context.Context, path string) error {
	for deadline := time.Now().Add(bootTime / 3); time.Now().Before(deadline) && ctx.Err() == nil; {
		if _, err := os.Stat(path); err == nil {
			return nil
		}
		time.Sleep(5 * time.Millisecond)
	}
	return fmt.Errorf("%s does not appear", path)
}

// join puts the VMM into the cgroup of the sandbox.
func join(spec *specs.Spec, pid int) (cgroup1.Cgroup, error) {
	if spec.Linux == nil || spec.Linux.CgroupsPath == "" {
		return nil, nil
	}
	group, err := cgroup1.New(cgroup1.StaticPath(spec.Linux.CgroupsPath), &specs.LinuxResources{})
	if err != nil {
		return nil, fmt.Errorf("cgroup: %w", err)
	}
	return group, group.Add(cgroup1.Process{Pid: pid})
}

// stop ends the machine as a power failure would.
func (m *machine) stop() {
	endMachine(m.id)
	<-m.ended
	if m.cgroup != nil {
		m.cgroup.Delete()
	}
}

// endMachine kills what belongs to a machine, and gives the VMM's process id.
func endMachine(id string) int {
	folder := filepath.Join(machines, id)
	vmm := 0
	for _, file := range []string{"vsock.pid", "pid"} {
		content, err := os.ReadFile(filepath.Join(folder, file))
		if err != nil {
			continue
		}
		pid, err := strconv.Atoi(string(content))
		if err != nil {
			continue
		}
		// Not another process that has got the number since.
		if line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); strings.Contains(string(line), folder) {
			syscall.Kill(pid, syscall.SIGKILL)
		}
		vmm = pid
	}
	os.RemoveAll(folder)
	return vmm
}

// --- requests ------------------------------------------------------------------------------------------------------

// conversation is one request with what follows it.
type conversation struct {
	*yamux.Stream
	reader *bufio.Reader
}

func (c conversation) Read(into []byte) (int, error) { return c.reader.Read(into) }

func (m *machine) open(request wire.Request) (conversation, error) {
	stream, err := m.session.OpenStream()
	if err != nil {
		return conversation{}, err
	}
	return conversation{stream, bufio.NewReader(stream)}, wire.Send(stream, request)
}

// reply waits for the next answer.
func (c conversation) reply() (wire.Reply, error) {
	var reply wire.Reply
	if err := wire.Receive(c.reader, &reply); err != nil {
		return reply, fmt.Errorf("the machine does not answer: %w", err)
	}
	if reply.Error != "" {
		return reply, errors.New(reply.Error)
	}
	return reply, nil
}

func (m *machine) ask(request wire.Request) error {
	talk, err := m.open(request)
	if err != nil {
		return err
	}
	defer talk.Close()
	_, err = talk.reply()
	return err
}

// copyIn packs what is in a folder, or one file of it, into a folder of the guest.
func (m *machine) copyIn(folder, name, into string) error {
	talk, err := m.open(wire.Request{Op: "unpack", Path: into})
	if err != nil {
		return err
	}
	command := exec.Command("tar", "--numeric-owner", "-c", "-C", folder, "--", name)
	command.Stdout = talk.Stream
	var said strings.Builder
	command.Stderr = &said
	if err := command.Run(); err != nil {
		talk.Close()
		return fmt.Errorf("tar of %s: %w: %s", folder, err, said.String())
	}
	// The end of what is sent; the answer still comes.
	talk.Close()
	_, err = talk.reply()
	return err
}
