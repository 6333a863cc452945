"""The demos: answer a text question or problems, with a dense cache and with compressed ones.

They need the extra `demo`, so the command line imports them only when it runs one.
"""
