/* Starting a command: what EXEC asks for becomes a child process (docs/protocol.md, Commands). */
#ifndef VMETTE_COMMAND_H
#define VMETTE_COMMAND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/types.h>

struct command {
    char **argv, **env;
    const char *cwd, *user; /* NULL: / and root */
    uint32_t flags;         /* enum exec_flag */
    uint16_t rows, columns; /* of the terminal */
};

/* Where commands run. */
struct place {
    struct rlimit files; /* the limit of open files that they get */
    int cgroup;          /* the directory of the next command's cgroup; -1: none */
    int pids;            /* the agent's own PID namespace */
    int terminals;       /* the directory of devpts, which nothing can be mounted over from here on; -1: there is none */
    pid_t init;          /* the command that is PID 1 of the namespaces in which the next commands run; 0: the agent's */
    int init_fd;         /* a pidfd of it */
    int init_started;    /* its `started`, while that is open; else -1 */
};

/* The agent's ends of a command. */
struct child {
    pid_t pid;
    int started;     /* a start_failure comes here, or nothing once the program has started */
    int stdin_fd;    /* non-blocking, as are the others; of a command with a terminal, the terminal's master */
    int out[2];      /* of a command with a terminal, the master again, and -1 */
    int terminal;    /* the terminal itself; -1: there is none */
    uint32_t cgroup; /* the number of its cgroup, which is the agent's to set */
};

/* What a child that could not exec tells its parent. */
struct start_failure {
    int error;
    char stage[12];
};

/* Parses EXEC into one allocation, returned and to be freed by the caller; NULL when malformed (errno EPROTO) or ENOMEM. */
void *parse_exec(const unsigned char *payload, size_t size, struct command *c);

/* Starts it. Returns 0, or an errno and at which stage it failed. */
int start_child(const struct command *c, struct place *place, struct child *child, const char **stage);

/* A child that is there before its command. An emulated machine that has just woken has all of its code to translate
 * anew: what was done before it was saved is a fourth of the way to its first command. */
struct spare {
    struct child child;
    int orders; /* takes one EXEC; -1: there is no spare */
};

/* Starts one, in the place as it is. Returns 0 or an errno. */
int start_spare(struct place *place, struct spare *spare);

/* Has it become the command of EXEC, which has been parsed. False: it cannot, nor any other one then. */
bool order_spare(struct spare *spare, const struct command *c, const unsigned char *payload, size_t size);

/* It is not needed, or gone: it ends by itself when there is nobody to give it an order. */
void dismiss_spare(struct spare *spare);

/* The namespaces' init has ended, and the kernel with it all that ran there: commands run in the agent's own again. */
void leave_init(struct place *place);

#endif
