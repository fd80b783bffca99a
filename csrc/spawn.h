/* Starting a child process that dies with its parent. */
#ifndef VMETTE_SPAWN_H
#define VMETTE_SPAWN_H

/* Starts `path` with `argv` and `envp`, in a session of its own, with descriptor fds[i] as targets[i] (count of them;
 * every other descriptor above 2 is closed). The kernel kills the child when the thread that called this ends: call it
 * from a thread that lives as long as the child should. Returns the process id, or a negative errno of what went
 * wrong, exec included. */
int vmette_spawn(const char *path, char *const argv[], char *const envp[], const int *fds, const int *targets,
                 int count);

#endif
