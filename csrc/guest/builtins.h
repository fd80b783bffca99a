/* Functions of the agent that the host can call like commands (EXEC with FLAG_BUILTIN, docs/protocol.md).
 *
 * They run in a child of the agent, as the user that EXEC names, in the guest's root; the current directory is EXEC's.
 * Data comes on stdin and goes to stdout. One that fails writes a record (ERRNO, STAGE: its name, TEXT) of at most 4096
 * bytes to stderr and ends with 1; what it has written to stdout before is a beginning and no more.
 *
 *   read PATH [OFFSET [LENGTH]]        the bytes of a file to stdout
 *   write PATH MODE [append]           stdin into a file, which is made with MODE (octal) if it is not there
 *   list PATH                          NAME, STAT and, of links, TARGET of each entry of a directory
 *   stat PATH [nofollow]               STAT and, of a link, TARGET
 *   mkdir PATH MODE [parents]          with `parents`, those that are missing too, and no error if it is there
 *   remove PATH [recursive] [missing]  never follows a link; with `missing`, no error if it is not there
 *   tar PATH                           a tar archive (PAX) of a directory's contents, or of one file, to stdout
 *   untar DIR [owners]                 unpacks the tar archive on stdin below DIR, which is made if it is not there
 *   secret NAME USER                   stdin into /run/secrets/NAME, which USER alone can read
 *   ca-certs                           PEM certificates on stdin become trusted by the distributions' usual bundles
 *   clock NSEC                         sets the time, in nanoseconds since the epoch
 *   share PATH [ro]                    mounts a directory of the host until stdin ends: FUSE's requests go to stdout
 *
 * remove: what a file system is mounted on is not removed (EBUSY), nor is a tree of more than 2048 levels (ELOOP).
 *
 * tar: PATH itself may be a link to what is meant. The first entry of a directory is `.`, with its mode, owner and time;
 * the others are named relative to it. One file is an entry with its own name. Sockets are left out, and so is what is
 * in /proc, /sys and the like where they are mounted in the tree. Of the first 65,536 files that have several names, the
 * other names are hard links; of further ones they are files of their own. Extended attributes: user.* and capabilities.
 *
 * untar: nothing outside DIR is touched, whatever the archive says and whatever links DIR holds: a name with `..` or `/`
 * in front is EINVAL, a link in a name's way ELOOP. What is damaged or cut off is EBADMSG. Files are replaced,
 * directories merge and get the entry's mode and time, `.` among them; missing parents are made with mode 0755. Devices,
 * capabilities and owners are given with `owners` only. It reads ustar, PAX and GNU's long names; no sparse files.
 *
 * share: PATH is absolute, and is made if it is not there. What goes over stdout and stdin are the bytes of /dev/fuse
 * (include/uapi/linux/fuse.h), one request or answer after the other; requests are of at most 32,768 bytes, answers of at
 * most 262,144. The first request comes when it is mounted. It ends, too, when somebody unmounts it.
 */
#ifndef VMETTE_BUILTINS_H
#define VMETTE_BUILTINS_H

/* Runs the function argv[0] with its arguments, in a process of its own. Returns 0; one that fails ends the process. */
int builtin_run(char **argv);

#endif
