package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/yamux"

	"podcheckpoint.dev/e2e/kata-tcg/wire"
)

// Containers is where the root filesystems and specifications of the containers are.
const containers = "/run/kata-containers"

// agent serves the shim.
type agent struct {
	mu sync.Mutex
	// The streams that wait for their process.
	stdio map[string]io.ReadWriteCloser
}

// stream is one of the session's, with what has been read of it already.
type stream struct {
	*yamux.Stream
	reader *bufio.Reader
}

func (s stream) Read(into []byte) (int, error) { return s.reader.Read(into) }

func serve() error {
	port, err := openPort(wire.Port)
	if err != nil {
		return err
	}
	agent := &agent{stdio: map[string]io.ReadWriteCloser{}}
	for {
		// The port ends when nobody is at its other side, as in a machine that was restored from a snapshot. The
		// containers go on.
		if err := agent.session(port); err != nil && err != io.EOF {
			say("agent: %v", err)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

func (a *agent) session(port io.ReadWriter) error {
	session, err := yamux.Server(struct {
		io.ReadWriter
		io.Closer
	}{port, io.NopCloser(nil)}, wire.Config())
	if err != nil {
		return err
	}
	defer session.Close()
	for {
		accepted, err := session.AcceptStream()
		if err != nil {
			return err
		}
		go a.answer(stream{accepted, bufio.NewReader(accepted)})
	}
}

func (a *agent) answer(s stream) {
	var request wire.Request
	if err := wire.Receive(s.reader, &request); err != nil {
		s.Close()
		return
	}
	if request.Op == "stdio" {
		a.mu.Lock()
		a.stdio[key(request, request.Fd)] = s
		a.mu.Unlock()
		wire.Send(s, wire.Reply{})
		return
	}
	defer s.Close()
	code, err := a.carryOut(s, request)
	reply := wire.Reply{Code: code}
	if err != nil {
		reply.Error = err.Error()
	}
	wire.Send(s, reply)
}

func key(request wire.Request, fd int) string {
	return fmt.Sprintf("%s/%s/%d", request.ID, request.Exec, fd)
}

func (a *agent) carryOut(s stream, request wire.Request) (uint32, error) {
	folder := filepath.Join(containers, request.ID)
	switch request.Op {
	case "ping":
		return 0, nil
	case "unpack":
		return 0, unpack(s, request.Path)
	case "run":
		if err := writeJSON(filepath.Join(folder, "config.json"), request.Spec); err != nil {
			return 0, err
		}
		pidFile := filepath.Join(folder, "init.pid")
		return a.start(s, request, pidFile, "run", "--bundle", folder, "--pid-file", pidFile, request.ID)
	case "exec":
		process := filepath.Join(folder, request.Exec+".json")
		if err := writeJSON(process, request.Process); err != nil {
			return 0, err
		}
		pidFile := filepath.Join(folder, request.Exec+".pid")
		return a.start(s, request, pidFile, "exec", "--process", process, "--pid-file", pidFile, request.ID)
	case "kill":
		if request.Exec != "" {
			return 0, signalExec(filepath.Join(folder, request.Exec+".pid"), request.Signal)
		}
		return 0, crun("kill", request.ID, strconv.Itoa(int(request.Signal)))
	case "pause", "resume":
		return 0, crun(request.Op, request.ID)
	case "delete":
		if request.Exec != "" {
			os.Remove(filepath.Join(folder, request.Exec+".pid"))
			return 0, os.Remove(filepath.Join(folder, request.Exec+".json"))
		}
		err := crun("delete", "--force", request.ID)
		return 0, errors.Join(err, os.RemoveAll(folder))
	}
	return 0, fmt.Errorf("unknown request %q", request.Op)
}

func unpack(s stream, path string) error {
	if err := os.MkdirAll(path, 0o755); err != nil {
		return err
	}
	command := exec.Command("tar", "-x", "-f", "-", "-C", path)
	var said bytes.Buffer
	command.Stdin, command.Stderr = s, &said
	if err := command.Run(); err != nil {
		return fmt.Errorf("tar: %w: %s", err, said.String())
	}
	return nil
}

// start runs crun in the foreground, says on the stream that the process has begun, and gives its end.
func (a *agent) start(s stream, request wire.Request, pidFile string, arguments ...string) (uint32, error) {
	log := strings.TrimSuffix(pidFile, ".pid") + ".log"
	os.Remove(log)
	os.Remove(pidFile)
	command := exec.Command("crun", append([]string{"--log", log}, arguments...)...)
	// Output that a process left behind may still write is not waited for.
	command.WaitDelay = time.Second
	stdin, stdout, stderr := a.claim(request, 0), a.claim(request, 1), a.claim(request, 2)
	for _, open := range []*optional{stdin, stdout, stderr} {
		if open.ReadWriteCloser != nil {
			defer open.Close()
		}
	}
	command.Stdout, command.Stderr = stdout.writer(), stderr.writer()
	if stdin.ReadWriteCloser != nil {
		pipe, err := command.StdinPipe()
		if err != nil {
			return 0, err
		}
		go func() {
			io.Copy(pipe, stdin)
			pipe.Close()
		}()
	}
	if err := command.Start(); err != nil {
		return 0, err
	}
	ended := make(chan error, 1)
	go func() { ended <- command.Wait() }()
	for {
		select {
		case err := <-ended:
			if _, missing := os.Stat(pidFile); missing != nil {
				said, _ := os.ReadFile(log)
				return 0, fmt.Errorf("crun %s: %v: %s", arguments[0], err, said)
			}
			// It was quicker than the look at its file.
			wire.Send(s, wire.Reply{})
			return exitCode(command), nil
		case <-time.After(5 * time.Millisecond):
		}
		if content, err := os.ReadFile(pidFile); err == nil && len(content) > 0 {
			break
		}
	}
	wire.Send(s, wire.Reply{})
	<-ended
	return exitCode(command), nil
}

func exitCode(command *exec.Cmd) uint32 {
	if status, ok := command.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return 128 + uint32(status.Signal())
	}
	return uint32(command.ProcessState.ExitCode())
}

// optional is a stream that may not be there.
type optional struct{ io.ReadWriteCloser }

func (o *optional) writer() io.Writer {
	if o.ReadWriteCloser == nil {
		return nil
	}
	return o
}

func (a *agent) claim(request wire.Request, fd int) *optional {
	a.mu.Lock()
	defer a.mu.Unlock()
	name := key(request, fd)
	found := a.stdio[name]
	delete(a.stdio, name)
	return &optional{found}
}

func signalExec(pidFile string, signal uint32) error {
	content, err := os.ReadFile(pidFile)
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(content)))
	if err != nil {
		return err
	}
	return syscall.Kill(pid, syscall.Signal(signal))
}

func crun(arguments ...string) error {
	said, err := exec.Command("crun", arguments...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("crun %s: %w: %s", arguments[0], err, said)
	}
	return nil
}

func writeJSON(path string, value any) error {
	content, err := json.Marshal(value)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, content, 0o600)
}
