"""The toy target: data in `target`, how to build for it and run there in `toolchain`."""
