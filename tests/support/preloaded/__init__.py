"""Commands and ranks as forks of processes that have imported torch and megatron once.

Importing takes 6 to 12 CPU seconds a process, while most tests then need tenths of one. So a
**server** imports everything once for a test run and forks a child for each command, which runs the
script as ``__main__`` and ends with its status. A test starts ``python`` in the session's folder,
the **stand-in**: an ordinary process that takes a command line as ``python`` does, sends it with
its environment, working directory, standard streams and limits to the server that suits the script,
forwards signals, and ends as the child ended. The real ``python`` runs whatever is no script of the
project.

    session.py             the folder of a test run with its stand-in and servers
    stand_in.py            the stand-in; it imports the standard library alone, so that it starts in
                           a hundredth of a second
    server.py              the servers: their imports, the loop that forks, and the child
    preloaded_messages.py  the messages between stand-in and server

A child differs from a real process in its parent, which is the server, so nothing may watch its
parent or process group; in the environment that an import reads; and in the mount namespace. A test
that needs these must start ``sys.executable`` itself (``cold=True``).
"""
