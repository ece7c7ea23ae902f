// clustertool is the cluster's one small program, standard library only.
//
//	clustertool pause                       wait for SIGTERM and reap orphans: init of the
//	                                        cluster's pid namespace, and the pause image
//	nslookup NAME                           (by that name, a link) resolve through
//	                                        /etc/resolv.conf, exit 0 if there is an address
//	clustertool fwd NSENTER-ARGS -- A=B ... listen on A (in the network namespace this is
//	                                        started in), forward each connection to B dialled
//	                                        from inside the namespaces that nsenter enters
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

func die(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "clustertool:", err)
		os.Exit(1)
	}
}

func pause() {
	c := make(chan os.Signal, 16)
	signal.Notify(c, syscall.SIGTERM, syscall.SIGINT, syscall.SIGCHLD)
	for s := range c {
		if s != syscall.SIGCHLD {
			return
		}
		for {
			if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	}
}

// fwd opens the listeners, then becomes nsenter, which becomes clustertool again: a
// socket stays in the network namespace it was made in, so the accepting side is
// outside and the dialling side inside, with no interface between the two.
func fwd(args []string) {
	var enter []string
	for len(args) > 0 && args[0] != "--" {
		enter, args = append(enter, args[0]), args[1:]
	}
	self, err := os.Executable()
	die(err)
	nsenter, err := exec.LookPath("nsenter")
	die(err)
	argv := append([]string{"nsenter"}, enter...)
	argv = append(argv, "--", self, "fwd-child")
	for _, a := range args[1:] {
		from, to, _ := strings.Cut(a, "=")
		l, err := net.Listen("tcp", from)
		die(err)
		f, err := l.(*net.TCPListener).File()
		die(err)
		_, _, e := syscall.Syscall(syscall.SYS_FCNTL, f.Fd(), syscall.F_SETFD, 0)
		if e != 0 {
			die(e)
		}
		argv = append(argv, fmt.Sprintf("%d=%s", f.Fd(), to))
	}
	die(syscall.Exec(nsenter, argv, os.Environ()))
}

func fwdChild(args []string) {
	for _, a := range args {
		fd, to, _ := strings.Cut(a, "=")
		n, err := strconv.Atoi(fd)
		die(err)
		l, err := net.FileListener(os.NewFile(uintptr(n), "listener"))
		die(err)
		go func(l net.Listener, to string) {
			for {
				c, err := l.Accept()
				die(err)
				go pipe(c.(*net.TCPConn), to)
			}
		}(l, to)
	}
	select {}
}

func pipe(a *net.TCPConn, to string) {
	defer a.Close()
	c, err := net.Dial("tcp", to)
	if err != nil {
		fmt.Fprintln(os.Stderr, "clustertool:", err)
		return
	}
	b := c.(*net.TCPConn)
	defer b.Close()
	done := make(chan bool, 2)
	cp := func(dst, src *net.TCPConn) { io.Copy(dst, src); dst.CloseWrite(); done <- true }
	go cp(b, a)
	go cp(a, b)
	<-done
	<-done
}

// nslookup stands in for busybox's, which asks every search domain and fails if one
// of them does not know the name: a loop like "until nslookup X" never ends with it.
func nslookup(args []string) {
	if len(args) == 0 {
		die(fmt.Errorf("usage: nslookup NAME"))
	}
	addrs, err := net.LookupHost(args[0])
	die(err)
	for _, a := range addrs {
		fmt.Printf("Name:\t%s\nAddress: %s\n", args[0], a)
	}
}

func main() {
	if filepath.Base(os.Args[0]) == "nslookup" {
		nslookup(os.Args[1:])
		return
	}
	if len(os.Args) < 2 {
		die(fmt.Errorf("usage: clustertool pause | fwd NSENTER-ARGS -- LISTEN=DIAL ..."))
	}
	switch os.Args[1] {
	case "pause":
		pause()
	case "fwd":
		fwd(os.Args[2:])
	case "fwd-child":
		fwdChild(os.Args[2:])
	default:
		die(fmt.Errorf("unknown command %q", os.Args[1]))
	}
}
