# Runs as the test guest's only program: answers the host's tests over vsock port 1000.
# A connection's first line says what it wants.
import hashlib, mmap, os, socket, threading

def echo(connection, lines, words):
    while data := connection.recv(65536):
        connection.sendall(data)

def digest(connection, lines, words):
    hash = hashlib.sha256(lines.read())
    connection.sendall(hash.hexdigest().encode())

def read(connection, lines, words):
    with open(words[1], "rb") as file:
        connection.sendall(file.read(int(words[2])))

def source(connection, lines, words):
    block = bytes(range(256)) * 256
    for _ in range(int(words[1]) // len(block)):
        connection.sendall(block)

def touch(connection, lines, words):
    size = int(words[1])
    memory = mmap.mmap(-1, size)
    for at in range(0, size, 4096):
        memory[at] = 1
    connection.sendall(b"touched\n")
    lines.readline()
    memory.close()
    connection.sendall(b"freed\n")

def serve(connection):
    # Unbuffered: what follows the line is for recv.
    with connection, connection.makefile("rb", buffering=0) as lines:
        words = lines.readline().decode().split()
        try:
            globals()[words[0]](connection, lines, words)
        except OSError as error:
            print("service:", words, error, flush=True)

listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
listener.bind((socket.VMADDR_CID_ANY, 1000))
listener.listen(1024)
print("service: ready", flush=True)
while True:
    connection, _ = listener.accept()
    threading.Thread(target=serve, args=(connection,), daemon=True).start()
