"""Commands and ranks as forks of processes that have imported torch, transformers and megatron once.

Importing takes 6 to 12 CPU seconds a process, what most tests then do takes tenths of one. So a **server** imports everything
once for a test run and forks a child for each command, which runs the script as ``__main__`` and ends with its status.
What a test starts is ``python`` in the session's folder, the **stand-in**: an ordinary process that takes a command line as
``python`` does, hands it with its environment, working directory, standard streams and limits to the server that suits the script,
passes signals on, and ends as the child ended. Whatever is no script of the project, the real ``python`` runs.

    session.py   the folder of a test run, its stand-in and its servers: made when pytest starts, ended when it ends
    stand_in.py  what the stand-in does; the standard library alone, since it must start in a hundredth of a second
    server.py    the servers: what each imports, the loop that forks, and what a child does
    messages.py  what the two say to each other

Differences from a real process, for which a test must start ``sys.executable`` itself (``cold=True``): the child's parent is the
server, so nothing that watches its parent or its process group; the environment that an import reads; the mount namespace.
"""
