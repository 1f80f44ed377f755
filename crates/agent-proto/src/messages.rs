//! The messages. Tags never change: a new field or operation gets a new tag, and the tag of a
//! removed one stays unused.
// Fields of protobuf messages are documented where their names do not explain them.

use prost::{Message, Oneof};

pub use crate::file_messages::*;

/// A message of a host.
#[derive(Clone, PartialEq, Message)]
pub struct FromHost {
    /// The message; absent if a newer host sent a kind that this side does not know.
    #[prost(oneof = "from_host::Kind", tags = "1, 2, 3, 4, 5, 6, 7, 8")]
    pub kind: Option<from_host::Kind>,
}

/// The kinds of a host's messages.
pub mod from_host {
    use super::*;

    /// One of these.
    #[derive(Clone, PartialEq, Oneof)]
    pub enum Kind {
        /// The one request of a connection, which must be the first message.
        #[prost(message, tag = "1")]
        Request(Request),
        /// Input for a command, at most [`crate::CHUNK`] bytes. No more than
        /// [`crate::INPUT_WINDOW`] bytes may be under way beyond what the agent said was taken.
        #[prost(bytes, tag = "2")]
        Stdin(Vec<u8>),
        /// The end of a command's input.
        #[prost(message, tag = "3")]
        StdinEnd(Empty),
        /// A signal for a command's process group.
        #[prost(int32, tag = "4")]
        Signal(i32),
        /// The terminal's new size.
        #[prost(message, tag = "5")]
        Resize(TerminalSize),
        /// The positions up to which a command's output has arrived.
        #[prost(message, tag = "6")]
        Acknowledge(Acknowledge),
        /// A piece of a file to write, or of the data for a connection.
        #[prost(bytes, tag = "7")]
        Data(Vec<u8>),
        /// The end of a file to write, or of the data for a connection.
        #[prost(message, tag = "8")]
        DataEnd(Empty),
    }
}

/// A message of an agent.
#[derive(Clone, PartialEq, Message)]
pub struct FromAgent {
    /// The message; absent if a newer agent sent a kind that this side does not know.
    #[prost(
        oneof = "from_agent::Kind",
        tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17"
    )]
    pub kind: Option<from_agent::Kind>,
}

/// The kinds of an agent's messages.
pub mod from_agent {
    use super::*;

    /// One of these.
    #[derive(Clone, PartialEq, Oneof)]
    pub enum Kind {
        /// The greeting, which is the first message on every connection.
        #[prost(message, tag = "1")]
        Hello(Hello),
        /// A command runs.
        #[prost(message, tag = "2")]
        Started(Started),
        /// A command's output.
        #[prost(message, tag = "3")]
        Output(Output),
        /// A command ended, and all its output was sent.
        #[prost(message, tag = "4")]
        Exited(Exited),
        /// The request failed.
        #[prost(message, tag = "5")]
        Error(Error),
        /// The request was carried out, and no more messages follow; also the end of a connection's
        /// data.
        #[prost(message, tag = "6")]
        Done(Empty),
        /// Facts about the guest.
        #[prost(message, tag = "7")]
        Info(Info),
        /// Facts about the file that follows.
        #[prost(message, tag = "8")]
        File(FileInfo),
        /// A piece of a file, or of a connection's data.
        #[prost(bytes, tag = "9")]
        Data(Vec<u8>),
        /// The commands that the agent knows.
        #[prost(message, tag = "10")]
        Commands(Commands),
        /// The number of bytes of input that the command has read since its start.
        #[prost(uint64, tag = "11")]
        InputTaken(u64),
        /// A connection within the guest was made.
        #[prost(message, tag = "12")]
        Connected(Empty),
        /// A part of the request that could not be carried out, as text for people. The other parts
        /// are carried out, and `Done` follows. Hosts that do not know this message skip it.
        #[prost(string, tag = "13")]
        Notice(String),
        /// A page of a directory.
        #[prost(message, tag = "14")]
        Directory(Directory),
        /// Facts about a file, a directory or a link.
        #[prost(message, tag = "15")]
        Entry(FileEntry),
        /// Files are watched from now on.
        #[prost(message, tag = "16")]
        Watching(Empty),
        /// A change of a file that is watched.
        #[prost(message, tag = "17")]
        Change(FileChange),
    }
}

/// The request of a connection.
#[derive(Clone, PartialEq, Message)]
pub struct Request {
    /// The operation; absent if a newer host requests one that this agent does not know.
    #[prost(
        oneof = "request::Operation",
        tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20"
    )]
    pub operation: Option<request::Operation>,
}

/// The operations.
pub mod request {
    use super::*;

    /// One of these.
    #[derive(Clone, PartialEq, Oneof)]
    pub enum Operation {
        /// Run a command: `Started`, `Output`…, `Exited`.
        #[prost(message, tag = "1")]
        Exec(Exec),
        /// Attach to a command after a lost connection: `Output`…, `Exited`.
        #[prost(message, tag = "2")]
        Attach(Attach),
        /// Return facts about the guest: `Info`.
        #[prost(message, tag = "3")]
        Info(Empty),
        /// Write a file: the host sends `Data`…, `DataEnd`; the agent sends `Done`.
        #[prost(message, tag = "4")]
        Put(Put),
        /// Read a file: `File`, `Data`…, `Done`.
        #[prost(message, tag = "5")]
        Get(Get),
        /// Write dirty data to the disks: `Done`.
        #[prost(message, tag = "6")]
        Sync(Empty),
        /// Apply a new identity: `Notice` for each step that failed, then `Done`; an error if two
        /// guests would share a secret or an address.
        #[prost(message, tag = "7")]
        SetIdentity(Identity),
        /// Switch off or reboot: `Done`, then the guest ends.
        #[prost(message, tag = "8")]
        Shutdown(Shutdown),
        /// List the commands: `Commands`.
        #[prost(message, tag = "9")]
        ListCommands(Empty),
        /// Connect to a port in the guest: `Connected`, then both sides send `Data`… as it comes,
        /// each until its end, which the host calls `DataEnd` and the agent `Done`.
        #[prost(message, tag = "10")]
        Connect(Connect),
        /// Send a signal to a command, independently of the attached host: `Done`.
        #[prost(message, tag = "11")]
        SignalCommand(SignalCommand),
        /// List a page of a directory: `Directory`.
        #[prost(message, tag = "12")]
        ListDirectory(ListDirectory),
        /// Describe a file: `Entry`.
        #[prost(message, tag = "13")]
        StatFile(StatFile),
        /// Make a directory: `Done`.
        #[prost(message, tag = "14")]
        MakeDirectory(MakeDirectory),
        /// Remove a file or a directory: `Done`.
        #[prost(message, tag = "15")]
        RemoveFile(RemoveFile),
        /// Rename a file or a directory: `Done`.
        #[prost(message, tag = "16")]
        RenameFile(RenameFile),
        /// Read a part of a file: `File` with the size of the whole, `Data`…, `Done`.
        #[prost(message, tag = "17")]
        GetRange(GetRange),
        /// Read a directory as a tar archive: `File` without a size, `Data`…, `Done`.
        #[prost(message, tag = "18")]
        Pack(Pack),
        /// Unpack a tar archive: the host sends `Data`…, `DataEnd`; the agent sends `Done`.
        #[prost(message, tag = "19")]
        Unpack(Unpack),
        /// Watch files: `Watching`, `Change`… until the host closes the connection, or `Done` when
        /// what is watched is gone.
        #[prost(message, tag = "20")]
        WatchFiles(WatchFiles),
    }
}

/// A message without content.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Empty {}

/// The agent's greeting.
#[derive(Clone, PartialEq, Message)]
pub struct Hello {
    /// [`crate::PROTOCOL`].
    #[prost(uint32, tag = "1")]
    pub protocol: u32,
    /// The agent's own version, for people.
    #[prost(string, tag = "2")]
    pub agent_version: String,
    /// The tags of the operations that the agent knows.
    #[prost(uint32, repeated, tag = "3")]
    pub operations: Vec<u32>,
    /// The longest message that the agent accepts, in bytes. Absent from agents of the first
    /// release, which accept [`crate::frame::FIRST_MAX_MESSAGE`].
    #[prost(uint32, optional, tag = "4")]
    pub max_message: Option<u32>,
}

/// A command to run.
#[derive(Clone, PartialEq, Message)]
pub struct Exec {
    /// Program and arguments; a program without a slash is looked up in the PATH. Empty is the
    /// image's own command.
    #[prost(string, repeated, tag = "1")]
    pub command: Vec<String>,
    /// `NAME=value`, added to the agent's defaults and the image's.
    #[prost(string, repeated, tag = "2")]
    pub environment: Vec<String>,
    /// Working directory; the image's by default, else the user's home.
    #[prost(string, tag = "3")]
    pub directory: String,
    /// `user`, `user:group`, or numbers; the image's by default, else root.
    #[prost(string, tag = "4")]
    pub user: String,
    /// A terminal of this size; stdout and stderr are one stream then.
    #[prost(message, optional, tag = "5")]
    pub terminal: Option<TerminalSize>,
    /// The time limit after which the command and its process group are ended; 0 means none.
    #[prost(uint64, tag = "6")]
    pub timeout_ms: u64,
    /// Whether the command continues when no host is connected, keeping only its newest output.
    #[prost(bool, tag = "7")]
    pub detached: bool,
    /// Whether input will follow; otherwise the command's input is empty.
    #[prost(bool, tag = "8")]
    pub input: bool,
    /// Run the user's login shell, or one that the guest has where the user has none to log in
    /// with. `command` is then what agents run that do not know this field.
    #[prost(bool, tag = "9")]
    pub login_shell: bool,
    /// How long the command is kept after a host has seen its end, in milliseconds, with the newest
    /// output that it printed, seen or not; 0 means that it is forgotten then.
    #[prost(uint64, tag = "10")]
    pub keep_ms: u64,
}

/// A terminal's size in characters.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct TerminalSize {
    /// Height.
    #[prost(uint32, tag = "1")]
    pub rows: u32,
    /// Width.
    #[prost(uint32, tag = "2")]
    pub columns: u32,
}

/// Attaches to a command.
#[derive(Clone, PartialEq, Message)]
pub struct Attach {
    /// As in [`Started`].
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// The number of bytes of standard output that have arrived.
    #[prost(uint64, tag = "2")]
    pub stdout_cursor: u64,
    /// The number of bytes of standard error that have arrived.
    #[prost(uint64, tag = "3")]
    pub stderr_cursor: u64,
    /// Read beside the attached host instead of in its place. The command does not wait for such a
    /// reader: output is dropped for one that is too slow. Agents that do not know this field
    /// attach.
    #[prost(bool, tag = "4")]
    pub observe: bool,
}

/// The positions up to which a command's output has arrived, in bytes since its start.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Acknowledge {
    /// The position in standard output.
    #[prost(uint64, tag = "1")]
    pub stdout_cursor: u64,
    /// The position in standard error.
    #[prost(uint64, tag = "2")]
    pub stderr_cursor: u64,
}

/// A command runs.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Started {
    /// The command's id in this guest, for [`Attach`].
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Its process id in the guest.
    #[prost(uint32, tag = "2")]
    pub pid: u32,
    /// The number of bytes of input that the agent has received since the command's start, from
    /// former connections.
    #[prost(uint64, tag = "3")]
    pub input_received: u64,
    /// The number of those that the command has read.
    #[prost(uint64, tag = "4")]
    pub input_taken: u64,
}

/// One of a command's outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Stream {
    /// Standard output, or the terminal.
    Stdout = 0,
    /// Standard error.
    Stderr = 1,
}

/// A piece of a command's output.
#[derive(Clone, PartialEq, Message)]
pub struct Output {
    /// The output.
    #[prost(enumeration = "Stream", tag = "1")]
    pub stream: i32,
    /// The number of bytes of this output before this piece. It is larger than the number seen so
    /// far if older output of a detached command was dropped.
    #[prost(uint64, tag = "2")]
    pub cursor: u64,
    /// At most [`crate::CHUNK`] bytes.
    #[prost(bytes = "vec", tag = "3")]
    pub data: Vec<u8>,
}

/// The end of a command.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Exited {
    /// The exit status, unless a signal ended the command.
    #[prost(int32, optional, tag = "1")]
    pub code: Option<i32>,
    /// The signal that ended the command.
    #[prost(int32, optional, tag = "2")]
    pub signal: Option<i32>,
    /// Whether the command exceeded its time limit.
    #[prost(bool, tag = "3")]
    pub timed_out: bool,
}

/// The kinds of failure of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum ErrorCode {
    /// Any other failure.
    Other = 0,
    /// The agent does not know the operation: it is older than the host.
    Unsupported = 1,
    /// The request is invalid.
    Invalid = 2,
    /// A program, file, user or command that does not exist.
    NotFound = 3,
    /// Access to a file, or running a program, is not permitted.
    Denied = 4,
    /// The guest lacks a resource, such as disk space.
    Exhausted = 5,
}

/// A request failed.
#[derive(Clone, PartialEq, Message)]
pub struct Error {
    /// The kind of failure, for programs.
    #[prost(enumeration = "ErrorCode", tag = "1")]
    pub code: i32,
    /// The failed operation and its error, for people.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// Facts about the guest.
#[derive(Clone, PartialEq, Message)]
pub struct Info {
    /// `uname -n`.
    #[prost(string, tag = "1")]
    pub hostname: String,
    /// `uname -r`.
    #[prost(string, tag = "2")]
    pub kernel: String,
    /// The time since boot.
    #[prost(uint64, tag = "3")]
    pub uptime_ms: u64,
    /// `MemTotal`.
    #[prost(uint64, tag = "4")]
    pub memory_total: u64,
    /// `MemAvailable`.
    #[prost(uint64, tag = "5")]
    pub memory_available: u64,
    /// The load average of one minute, in thousandths.
    #[prost(uint32, tag = "6")]
    pub load_milli: u32,
    /// The number of running commands.
    #[prost(uint32, tag = "7")]
    pub commands: u32,
    /// The time since the last request other than this one.
    #[prost(uint64, tag = "8")]
    pub idle_ms: u64,
    /// The guest's clock, nanoseconds since 1970.
    #[prost(uint64, tag = "9")]
    pub clock_ns: u64,
}

/// A file to write.
#[derive(Clone, PartialEq, Message)]
pub struct Put {
    /// An absolute path. The file is made or replaced atomically.
    #[prost(string, tag = "1")]
    pub path: String,
    /// Permission bits.
    #[prost(uint32, tag = "2")]
    pub mode: u32,
    /// Owner, as in [`Exec::user`].
    #[prost(string, tag = "3")]
    pub user: String,
    /// The file's name if `path` is a directory. Without one, a directory is refused.
    #[prost(string, tag = "4")]
    pub name: String,
}

/// A file to read.
#[derive(Clone, PartialEq, Message)]
pub struct Get {
    /// An absolute path.
    #[prost(string, tag = "1")]
    pub path: String,
}

/// Facts about a file.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct FileInfo {
    /// The size in bytes; an estimate for a file that grows.
    #[prost(uint64, tag = "1")]
    pub size: u64,
    /// Permission bits.
    #[prost(uint32, tag = "2")]
    pub mode: u32,
}

/// The new identity of a guest. Empty fields change nothing.
#[derive(Clone, PartialEq, Message)]
pub struct Identity {
    /// Host name.
    #[prost(string, tag = "1")]
    pub hostname: String,
    /// `/etc/machine-id`: 32 hexadecimal digits.
    #[prost(string, tag = "2")]
    pub machine_id: String,
    /// Fresh randomness for the kernel's pool.
    #[prost(bytes = "vec", tag = "3")]
    pub seed: Vec<u8>,
    /// The wall clock, in nanoseconds since 1970; 0 leaves it unchanged.
    #[prost(uint64, tag = "4")]
    pub clock_ns: u64,
    /// Network interfaces.
    #[prost(message, repeated, tag = "5")]
    pub interfaces: Vec<Interface>,
    /// Name servers.
    #[prost(string, repeated, tag = "6")]
    pub dns: Vec<String>,
    /// Whether to replace the SSH host keys by new ones of the same kinds.
    #[prost(bool, tag = "7")]
    pub new_ssh_host_keys: bool,
}

/// A network interface's new settings.
#[derive(Clone, PartialEq, Message)]
pub struct Interface {
    /// The name, as in `eth0`; if empty, the interface is chosen by its index among the Ethernet
    /// interfaces.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Hardware address, as in `02:00:00:00:00:01`.
    #[prost(string, tag = "2")]
    pub mac: String,
    /// IPv4 address with prefix length, as in `10.0.0.2/24`.
    #[prost(string, tag = "3")]
    pub address: String,
    /// IPv4 default gateway.
    #[prost(string, tag = "4")]
    pub gateway: String,
}

/// A request for a connection to a program in the guest.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Connect {
    /// The TCP port, on the guest's loopback.
    #[prost(uint32, tag = "1")]
    pub port: u32,
}

/// Ends the guest.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Shutdown {
    /// Whether to reboot instead of switching off.
    #[prost(bool, tag = "1")]
    pub reboot: bool,
}

/// A signal for a command.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct SignalCommand {
    /// As in [`Started`].
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// The signal's number. The command's process group gets it.
    #[prost(int32, tag = "2")]
    pub signal: i32,
}

/// The commands that an agent knows.
#[derive(Clone, PartialEq, Message)]
pub struct Commands {
    /// The running commands, and the ended ones whose end no host has seen.
    #[prost(message, repeated, tag = "1")]
    pub commands: Vec<CommandInfo>,
}

/// A command.
#[derive(Clone, PartialEq, Message)]
pub struct CommandInfo {
    /// As in [`Started`].
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Its process id in the guest.
    #[prost(uint32, tag = "2")]
    pub pid: u32,
    /// Program and arguments; long ones are cut.
    #[prost(string, repeated, tag = "3")]
    pub command: Vec<String>,
    /// The command's end, once it has ended.
    #[prost(message, optional, tag = "4")]
    pub exited: Option<Exited>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What agents of the first release put on the wire. It must decode for ever.
    const GOLDEN_EXEC: &str = "0a320a300a0273680a022d630a066578697420331203413d311a042f746d70\
                               22066e6f626f64792a040818105030dc0b38014001";

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn request() -> FromHost {
        let exec = Exec {
            command: vec!["sh".to_owned(), "-c".to_owned(), "exit 3".to_owned()],
            environment: vec!["A=1".to_owned()],
            directory: "/tmp".to_owned(),
            user: "nobody".to_owned(),
            terminal: Some(TerminalSize {
                rows: 24,
                columns: 80,
            }),
            timeout_ms: 1500,
            detached: true,
            input: true,
            login_shell: false,
            keep_ms: 0,
        };
        let request = Request {
            operation: Some(request::Operation::Exec(exec)),
        };
        FromHost {
            kind: Some(from_host::Kind::Request(request)),
        }
    }

    #[test]
    fn an_exec_request_is_encoded_as_in_the_first_release() {
        assert_eq!(hex(&request().encode_to_vec()), GOLDEN_EXEC);
    }

    #[test]
    fn a_connect_request_is_encoded_as_in_its_first_release() {
        let request = Request {
            operation: Some(request::Operation::Connect(Connect { port: 8080 })),
        };
        let message = FromHost {
            kind: Some(from_host::Kind::Request(request)),
        };
        assert_eq!(hex(&message.encode_to_vec()), "0a05520308903f");
        let answer = FromAgent {
            kind: Some(from_agent::Kind::Connected(Empty {})),
        };
        assert_eq!(hex(&answer.encode_to_vec()), "6200");
    }

    #[test]
    fn a_signal_for_a_command_is_encoded_as_in_its_first_release() {
        let signal = SignalCommand { id: 7, signal: 15 };
        let request = Request {
            operation: Some(request::Operation::SignalCommand(signal)),
        };
        let message = FromHost {
            kind: Some(from_host::Kind::Request(request)),
        };
        assert_eq!(hex(&message.encode_to_vec()), "0a065a040807100f");
    }

    #[test]
    fn fields_of_the_second_release_are_absent_from_what_does_not_use_them() {
        assert_eq!(hex(&request().encode_to_vec()), GOLDEN_EXEC);
        let put = Put {
            path: "/f".to_owned(),
            ..Put::default()
        };
        assert_eq!(hex(&put.encode_to_vec()), "0a022f66");
        let put = Put {
            name: "n".to_owned(),
            ..put
        };
        assert_eq!(hex(&put.encode_to_vec()), "0a022f6622016e");
        let shell = Exec {
            login_shell: true,
            ..Exec::default()
        };
        assert_eq!(hex(&shell.encode_to_vec()), "4801");
        let kept = Exec {
            keep_ms: 1,
            ..Exec::default()
        };
        assert_eq!(hex(&kept.encode_to_vec()), "5001");
        let observer = Attach {
            id: 1,
            observe: true,
            ..Attach::default()
        };
        assert_eq!(hex(&observer.encode_to_vec()), "08012001");
        let hello = Hello {
            max_message: Some(8),
            ..Hello::default()
        };
        assert_eq!(hex(&hello.encode_to_vec()), "2008");
    }

    #[test]
    fn a_notice_is_nothing_to_a_host_that_does_not_know_it() {
        let notice = FromAgent {
            kind: Some(from_agent::Kind::Notice("x".to_owned())),
        };
        let bytes = notice.encode_to_vec();
        assert_eq!(hex(&bytes), "6a0178");
        // A message without known fields, which is what it is to a host of the first release.
        assert_eq!(Empty::decode(&bytes[..]).unwrap(), Empty {});
    }

    #[test]
    fn an_operation_of_a_newer_host_is_seen_as_unknown_and_not_as_garbage() {
        // Operation tag 99, an empty message.
        let bytes = [0x0A, 0x03, 0x9A, 0x06, 0x00];
        let message = FromHost::decode(&bytes[..]).unwrap();
        let Some(from_host::Kind::Request(request)) = message.kind else {
            panic!("{message:?}")
        };
        assert_eq!(request.operation, None);
    }

    #[test]
    fn fields_of_a_newer_agent_are_skipped() {
        let started = Started {
            id: 7,
            pid: 9,
            ..Started::default()
        };
        let mut bytes = started.encode_to_vec();
        assert_eq!(hex(&bytes), "08071009");
        bytes.extend_from_slice(&[0xF8, 0x06, 0x01]);
        assert_eq!(Started::decode(&bytes[..]).unwrap(), started);
    }
}
