/* Copying files into, and measuring, directory trees whose content is not trusted. */
#ifndef VMETTE_INJECT_H
#define VMETTE_INJECT_H

#include <stdint.h>

/* Copies the regular file `source` to `root`/`relative` with permissions `mode`. No symlink below `root` is followed:
 * one among the parents is ELOOP, one at the end is replaced. Missing directories are made (0755). A target of equal
 * size and with an mtime not older than the source's is left alone. The copy appears whole, by rename, or not at all.
 * Returns 1 when it copied, 0 when there was nothing to do, or a negative errno. */
int vmette_copy_into(const char *root, const char *relative, const char *source, unsigned mode);

struct vmette_tree {
    uint64_t entries; /* below the root, the root itself not counted */
    uint64_t bytes;   /* sum of the sizes of regular files; a file with two names counts twice */
    int64_t newest;   /* newest mtime, the root's too, in nanoseconds since 1970 */
};

/* Measures a tree. Symlinks are counted and never followed. Returns 0 or a negative errno. */
int vmette_stat_tree(const char *root, struct vmette_tree *result);

#endif
