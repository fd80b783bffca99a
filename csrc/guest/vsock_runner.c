/* vsock-runner SIGNAL_PORT LISTEN_PORT: runs one command for the host.
 *
 * It listens at LISTEN_PORT, and then says "READY\n" to SIGNAL_PORT of the host. On the first connection it reads a
 * command line up to the end (half-close), runs it with /bin/sh -c, and sends back what it writes, stdout and stderr as
 * one, and a last line of its own: __EXIT__:N, where N is the exit status, 128 + S if signal S ended the command. */
#define _GNU_SOURCE
#include "vsock.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

const char *const program = "vsock-runner";

enum { MAX_COMMAND = 65535, CANNOT_RUN = 126 };

static int listen_at(unsigned port) {
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port};
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) != 0 || listen(fd, 1) != 0)
        give_up("cannot listen at port %u", port);
    return fd;
}

static void tell_ready(unsigned port) {
    int fd = vsock_connect(VMADDR_CID_HOST, port);
    if (fd < 0 || !write_all(fd, "READY\n", 6)) give_up("cannot say READY to port %u of the host", port);
    close(fd);
}

/* Reads the command to the end. NULL, or why it cannot be run; what is left of it is read away even then, as a socket
 * that is closed with bytes in it resets the connection, and the answer would be lost. */
static const char *read_command(int fd, char command[MAX_COMMAND + 1]) {
    size_t used = 0;
    bool too_long = false;
    for (;;) {
        char beyond[4096], *at = used < MAX_COMMAND ? command + used : beyond;
        ssize_t n = read(fd, at, used < MAX_COMMAND ? MAX_COMMAND - used : sizeof beyond);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) give_up("cannot read the command");
        if (n == 0) break;
        if (at == beyond)
            too_long = true;
        else
            used += (size_t)n;
    }
    command[used] = 0;
    if (too_long) return "the command is longer than 65535 bytes";
    return memchr(command, 0, used) == NULL ? NULL : "there is a NUL in the command";
}

static int run(int fd, char *command) {
    pid_t pid = fork();
    if (pid < 0) give_up("cannot fork");
    if (pid == 0) {
        int null = open("/dev/null", O_RDONLY);
        dup2(null, STDIN_FILENO);
        dup2(fd, STDOUT_FILENO);
        dup2(fd, STDERR_FILENO);
        if (null > STDERR_FILENO) close(null);
        signal(SIGPIPE, SIG_DFL);
        execl("/bin/sh", "sh", "-c", command, (char *)NULL);
        dprintf(STDERR_FILENO, "%s: cannot run /bin/sh: %s\n", program, strerror(errno));
        _exit(errno == ENOENT ? 127 : CANNOT_RUN);
    }
    int status;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) continue;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

int main(int argc, char **argv) {
    static char command[MAX_COMMAND + 1];
    if (argc != 3) {
        dprintf(STDERR_FILENO, "usage: vsock-runner SIGNAL_PORT LISTEN_PORT\n");
        return 2;
    }
    unsigned signal_port = parse_vsock("port", argv[1]), listen_port = parse_vsock("port", argv[2]);
    signal(SIGPIPE, SIG_IGN);
    int listener = listen_at(listen_port);
    tell_ready(signal_port);
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0) give_up("cannot take a connection");
    close(listener);
    const char *refused = read_command(fd, command);
    if (refused != NULL) dprintf(fd, "%s: %s\n", program, refused);
    dprintf(fd, "__EXIT__:%d\n", refused != NULL ? CANNOT_RUN : run(fd, command));
    shutdown(fd, SHUT_RDWR); /* what the command left in the background may hold it open */
    return 0;
}
