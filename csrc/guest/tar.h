/* Tar archives: POSIX.1-2017, pax, "pax Interchange Format" and "ustar Interchange Format"; and of GNU's format
 * (tar.info, "Basic Tar Format") the long names and the large numbers, which are read and not written. */
#ifndef VMETTE_TAR_H
#define VMETTE_TAR_H

#include <stdbool.h>

enum { BLOCK = 512 };

struct tar_header {
    char name[100], mode[8], uid[8], gid[8], size[12], mtime[12], checksum[8], type, target[100];
    char magic[6], version[2], user[32], group[32], major[8], minor[8], prefix[155], unused[12];
};
_Static_assert(sizeof(struct tar_header) == BLOCK, "a header is one block");

enum tar_type {
    TAR_FILE = '0',
    TAR_HARD_LINK,
    TAR_SYMLINK,
    TAR_CHARACTER_DEVICE,
    TAR_BLOCK_DEVICE,
    TAR_DIRECTORY,
    TAR_FIFO,
    TAR_CONTIGUOUS_FILE,
    TAR_LONG_NAME = 'L',
    TAR_LONG_TARGET = 'K',
    TAR_EXTENDED = 'x',
    TAR_EXTENDED_SUN = 'X',
    TAR_EXTENDED_ALL = 'g'
};

/* Extended attributes, as star, GNU tar and libarchive keep them in pax records. */
#define TAR_ATTRIBUTE "SCHILY.xattr."

/* Which of them are kept: the others are the business of the system that they are on. */
bool tar_keeps_attribute(const char *name);

/* What the header's bytes sum up to, those of the checksum itself taken for spaces. */
unsigned tar_checksum(const struct tar_header *header);

/* The functions `tar` and `untar` (builtins.h). */
void tar(const char *path);
void untar(const char *directory, bool owners);

#endif
