// Command guest is process 1 of the test's virtual machines: it makes the root, and then runs containers with crun as
// the shim says, and the debug console as Kata's agent has it.
package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// carried is where the programs of the second disk are, which takes the place of what an own guest image has.
const carried = "/run/carried"

func main() {
	os.Setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin:"+carried)
	os.Setenv("HOME", "/root")
	if err := boot(); err != nil {
		halt("boot: %v", err)
	}
	parameters := kernelParameters()
	if err := hide(parameters); err != nil {
		say("hidden programs: %v", err)
	}
	if err := listenInSilence(parameters); err != nil {
		say("silent listener: %v", err)
	}
	if _, err := os.Stat("/dev/vdb"); err == nil {
		if err := unpackCarried(); err != nil {
			say("carried programs: %v", err)
		}
	}
	if slices.Contains(parameters, "agent.debug_console") {
		if err := openConsole(parameters); err != nil {
			say("debug console: %v", err)
		}
	}
	halt("agent: %v", serve())
}

func say(format string, values ...any) { fmt.Printf("kata-tcg: "+format+"\n", values...) }

// halt ends the machine. The message is on its serial line.
func halt(format string, values ...any) {
	say(format, values...)
	unix.Sync()
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

func kernelParameters() []string {
	line, _ := os.ReadFile("/proc/cmdline")
	return strings.Fields(string(line))
}

// hide takes a program out of the guest's image, by a parameter that a pod's annotation can give.
func hide(parameters []string) error {
	for _, parameter := range parameters {
		if program, found := strings.CutPrefix(parameter, "kata-tcg.hide="); found {
			if err := unix.Mount("/dev/null", program, "", unix.MS_BIND, ""); err != nil {
				return err
			}
		}
	}
	return nil
}

// listenInSilence makes a socket that seccomp's listeners can be sent to, and are never answered from.
func listenInSilence(parameters []string) error {
	for _, parameter := range parameters {
		if path, found := strings.CutPrefix(parameter, "kata-tcg.silent="); found {
			listener, err := net.Listen("unix", path)
			if err != nil {
				return err
			}
			silent = append(silent, listener)
		}
	}
	return nil
}

// silent keeps them open.
var silent []net.Listener

// boot begins in the initramfs and ends in the read-only root on the first disk.
func boot() error {
	steps := []func() error{
		func() error { return unix.Mount("proc", "/proc", "proc", 0, "") },
		func() error { return unix.Mount("sysfs", "/sys", "sysfs", 0, "") },
		func() error { return unix.Mount("devtmpfs", "/dev", "devtmpfs", 0, "") },
		loadModules,
		mountDisk,
		func() error { return unix.Mount("/dev", "/root/dev", "", unix.MS_MOVE, "") },
		func() error { return unix.Mount("/proc", "/root/proc", "", unix.MS_MOVE, "") },
		func() error { return unix.Mount("/sys", "/root/sys", "", unix.MS_MOVE, "") },
		func() error { return unix.Chdir("/root") },
		func() error { return unix.Mount(".", "/", "", unix.MS_MOVE, "") },
		func() error { return unix.Chroot(".") },
		func() error { return unix.Chdir("/") },
		func() error { return unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755") },
		func() error { return unix.Mount("tmpfs", "/tmp", "tmpfs", 0, "mode=1777") },
		func() error { return os.MkdirAll("/dev/pts", 0o755) },
		func() error { return unix.Mount("devpts", "/dev/pts", "devpts", 0, "ptmxmode=666") },
		func() error { return os.MkdirAll("/dev/shm", 0o1777) },
		func() error { return unix.Mount("tmpfs", "/dev/shm", "tmpfs", 0, "mode=1777") },
		func() error { return unix.Mount("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, "") },
		func() error { return exec.Command("ip", "link", "set", "lo", "up").Run() },
	}
	for number, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("step %d: %w", number, err)
		}
	}
	return nil
}

// loadModules loads them in the order of their names, which is that of their dependencies.
func loadModules() error {
	modules, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return err
	}
	slices.Sort(modules)
	for _, module := range modules {
		file, err := os.Open(module)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(file.Fd()), "", 0)
		file.Close()
		if err != nil && err != unix.EEXIST {
			return fmt.Errorf("%s: %w", module, err)
		}
	}
	return nil
}

func mountDisk() error {
	var err error
	for range 500 {
		if err = unix.Mount("/dev/vda", "/root", "ext4", unix.MS_RDONLY, ""); err == nil {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("/dev/vda: %w", err)
}

func unpackCarried() error {
	if err := os.MkdirAll(carried, 0o755); err != nil {
		return err
	}
	return exec.Command("tar", "-x", "-f", "/dev/vdb", "-C", carried).Run()
}
