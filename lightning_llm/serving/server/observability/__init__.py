"""What can be seen of a server from outside: metrics, traces and logs. None of them ever holds a prompt or a key."""
