// Package wire is what the shim on the node and the agent in the guest say to each other: on one virtio-serial port,
// many streams, each begun by a line of JSON. A port is used and not vsock because it does not stand in the way of a
// snapshot of the machine.
package wire

import (
	"bufio"
	"encoding/json"
	"io"
	"time"

	"github.com/hashicorp/yamux"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Port is the name of the virtio-serial port between shim and agent.
const Port = "agent"

// ConsolePort is the name of the port with the debug console, where it is not on vsock.
const ConsolePort = "console"

// Request begins a stream.
type Request struct {
	// Op is one of ping, unpack, stdio, run, exec, kill, pause, resume, delete.
	Op string
	// ID is the container; Exec, where it is set, a process that was started in it later.
	ID, Exec string
	// Path is the folder in the guest to unpack into: the tar follows.
	Path string
	// Fd is the descriptor to which the stream is tied: its bytes follow.
	Fd      int
	Spec    *specs.Spec
	Process *specs.Process
	Signal  uint32
	All     bool
}

// Reply answers a request. A process that runs gets a second one when it has ended.
type Reply struct {
	Error string
	Code  uint32
}

// Config has no time limit on a silent peer: a machine may be paused.
func Config() *yamux.Config {
	config := yamux.DefaultConfig()
	config.EnableKeepAlive = false
	config.ConnectionWriteTimeout = time.Hour
	config.StreamOpenTimeout = 0
	config.StreamCloseTimeout = time.Hour
	config.LogOutput = io.Discard
	return config
}

// Send writes one line.
func Send(stream io.Writer, message any) error {
	return json.NewEncoder(stream).Encode(message)
}

// Receive reads one line. What follows it stays in the reader.
func Receive(reader *bufio.Reader, message any) error {
	line, err := reader.ReadBytes('\n')
	if err != nil {
		return err
	}
	return json.Unmarshal(line, message)
}
