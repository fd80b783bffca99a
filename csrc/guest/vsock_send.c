/* vsock-send PORT [CID]: stdin to a vsock port, of the host unless told otherwise, and what it replies to stdout.
 *
 * The end of stdin is passed on (half-close); the end of the reply ends the program: with 0, with 1 if something failed,
 * with 2 if it was called wrongly. */
#define _GNU_SOURCE
#include "vsock.h"

#include <errno.h>
#include <linux/vm_sockets.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

const char *const program = "vsock-send";

/* Both directions at once, each at its own pace: a process for each. */
static _Noreturn void send_stdin(int fd, pid_t parent) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) exit(1); /* it has ended already */
    signal(SIGPIPE, SIG_IGN);
    /* A peer that takes no more is its own affair: its reply is what counts. */
    if (!copy(STDIN_FILENO, fd) && errno != EPIPE && errno != ECONNRESET) give_up("cannot send stdin");
    shutdown(fd, SHUT_WR);
    exit(0);
}

int main(int argc, char **argv) {
    if (argc < 2 || argc > 3) {
        dprintf(STDERR_FILENO, "usage: vsock-send PORT [CID]\n");
        return 2;
    }
    unsigned port = parse_vsock("port", argv[1]);
    unsigned cid = argc == 3 ? parse_vsock("CID", argv[2]) : VMADDR_CID_HOST;
    int fd = vsock_connect(cid, port);
    if (fd < 0) give_up("cannot connect to port %u of CID %u", port, cid);
    pid_t self = getpid(), sender = fork();
    if (sender < 0) give_up("cannot fork");
    if (sender == 0) send_stdin(fd, self);
    if (!copy(fd, STDOUT_FILENO)) give_up("cannot receive the reply");
    /* Stdin may go on for ever, and nobody is there for it any more. */
    int status = 0;
    if (waitpid(sender, &status, WNOHANG) == 0) {
        kill(sender, SIGKILL);
        return 0;
    }
    return status == 0 ? 0 : 1;
}
