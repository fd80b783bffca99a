/* Functions of the agent that the host can call like commands (EXEC with FLAG_BUILTIN, docs/protocol.md).
 *
 * They run in a child of the agent, as the user that EXEC names, in the guest's root; the current directory is EXEC's.
 * Data comes on stdin and goes to stdout. One that fails writes a record (ERRNO, STAGE, TEXT) to stderr and ends with 1.
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
 */
#ifndef VMETTE_BUILTINS_H
#define VMETTE_BUILTINS_H

/* Runs the function argv[0] with its arguments; returns the exit status. */
int builtin_run(char **argv);

#endif
