"""The command line of detachnet; installed as `detachnet_cli`."""
