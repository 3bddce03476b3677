package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"

	"podcheckpoint.dev/e2e/kata-tcg/wire"
)

// openConsole gives a shell of the guest's root to whoever connects: on the vsock port that Kata's parameter names, or
// on a virtio-serial port when the machine has one for it.
func openConsole(parameters []string) error {
	if port, err := openPort(wire.ConsolePort); err == nil {
		go func() {
			for {
				shell(patient{port})
			}
		}()
	}
	for _, parameter := range parameters {
		value, found := strings.CutPrefix(parameter, "agent.debug_console_vport=")
		if !found {
			continue
		}
		port, err := strconv.ParseUint(value, 10, 32)
		if err != nil {
			return err
		}
		return listen(uint32(port))
	}
	return nil
}

func listen(port uint32) error {
	socket, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Bind(socket, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: port}); err != nil {
		return err
	}
	if err := unix.Listen(socket, 8); err != nil {
		return err
	}
	go func() {
		for {
			connection, _, err := unix.Accept4(socket, unix.SOCK_CLOEXEC)
			if err != nil {
				say("debug console: %v", err)
				return
			}
			go func() {
				file := os.NewFile(uintptr(connection), "vsock")
				defer file.Close()
				shell(file)
			}()
		}
	}()
	return nil
}

// patient is a port that has no end: while nobody is at its other side there is nothing to read, which is not the end.
type patient struct{ *os.File }

func (p patient) Read(into []byte) (int, error) {
	for {
		count, err := p.File.Read(into)
		if count > 0 || (err != nil && err != io.EOF) {
			return count, err
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// shell runs one on a terminal of its own until it or the connection ends.
func shell(peer io.ReadWriter) {
	terminal, path, err := console.NewPty()
	if err != nil {
		say("debug console: %v", err)
		return
	}
	defer terminal.Close()
	side, err := os.OpenFile(path, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return
	}
	command := exec.Command("/bin/sh", "-i")
	command.Stdin, command.Stdout, command.Stderr = side, side, side
	command.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	command.Env = append(os.Environ(), "TERM=dumb")
	err = command.Start()
	side.Close()
	if err != nil {
		return
	}
	go func() {
		io.Copy(terminal, peer)
		// As Kata's agent does: the shell's traps do not run.
		command.Process.Kill()
	}()
	io.Copy(peer, terminal)
	command.Wait()
}

// openPort finds a virtio-serial port by its name.
func openPort(name string) (*os.File, error) {
	for range 200 {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, file := range names {
			if found, _ := os.ReadFile(file); strings.TrimSpace(string(found)) == name {
				return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(file)), os.O_RDWR, 0)
			}
		}
		if name == wire.ConsolePort {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil, fmt.Errorf("no virtio-serial port %s", name)
}
