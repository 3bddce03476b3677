package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// execute is what `kata-runtime exec` is to Kata: a command in the guest, through the debug console on vsock, with its
// output and its exit status. For tests only: the command must be one line.
func execute(sandbox string, command string) (int, error) {
	if err := os.Chdir(filepath.Join(machines, sandbox)); err != nil {
		return 0, err
	}
	console, err := net.Dial("unix", "kata.hvsock")
	if err != nil {
		return 0, err
	}
	defer console.Close()
	reader := bufio.NewReader(console)
	fmt.Fprint(console, "CONNECT 1026\n")
	if answer, err := reader.ReadString('\n'); err != nil || !strings.HasPrefix(answer, "OK ") {
		return 0, fmt.Errorf("the console answers %q: %v", answer, err)
	}
	// In a shell of its own, without a terminal, so that nothing is echoed into the output.
	quoted := strings.ReplaceAll(command, "'", `'\''`)
	fmt.Fprintf(console, "stty raw -echo; PS1=; echo BE''GIN; sh -c '%s' 2>&1 < /dev/null; echo EN''DED $?\n", quoted)
	begun := false
	for {
		line, err := reader.ReadString('\n')
		if err == io.EOF {
			return 0, fmt.Errorf("the console ended")
		} else if err != nil {
			return 0, err
		}
		line = strings.TrimRight(line, "\r\n")
		if before, status, found := strings.Cut(line, "ENDED "); begun && found {
			fmt.Print(before)
			return strconv.Atoi(status)
		}
		if begun {
			fmt.Println(line)
		}
		begun = begun || strings.HasSuffix(line, "BEGIN")
	}
}
