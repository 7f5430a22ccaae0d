"""The hostile side: modules that run in the processes of programs, or prepare them, on this machine or on a server.

They are loaded by path in an interpreter in which no package `coupled` exists, so each imports the standard library
alone and not even its neighbours. The host imports `codec` only, which both sides use.

`zygote`         The clean interpreter that forks one process per program.
`confine`        Namespaces, limits and lock-down of a program's process, with `landlock` and `seccomp`.
`child`          Loads the program in its own process and answers the host's calls.
`codec`          Values as tagged JSON.
`remote_runner`  The script that a request to a remote server carries.
"""
