/* Opening directories below another one, whatever links a hostile tree holds. */
#ifndef VMETTE_BENEATH_H
#define VMETTE_BENEATH_H

#include <stdbool.h>

/* Opens the directory `path` below the directory `root`; an empty path is that one itself. The path has no `..` and is
 * not absolute; no link is followed. With `make`, directories that are missing are made, with mode 0755.
 * Returns -1 with errno: ELOOP where a link is in the way. */
int open_beneath(int root, const char *path, int flags, bool make);

#endif
