/* A directory of the host, mounted in the guest over a stream of the control channel: FUSE, whose server is the host. */
#ifndef VMETTE_SHARE_H
#define VMETTE_SHARE_H

#include <stdbool.h>

/* Enters a directory of the root, given by its absolute path, and makes what is missing of it. Links of the image are
 * followed, as container engines do it: /var/run is /run there, and the root is where each of them ends. Returns -1 with
 * errno. */
int enter_directory(const char *path);

/* Mounts the file system at `target` and passes requests of the kernel to stdout, and answers from stdin to the kernel,
 * until stdin ends or somebody unmounts it. */
void serve_share(const char *target, bool read_only);

#endif
