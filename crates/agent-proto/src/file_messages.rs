//! The messages about files and directories, beside those that copy a file ([`Put`] and [`Get`]).
//! The rules of [`messages`](crate::messages) hold for them.
//!
//! Names and paths that an agent sends are bytes, as Linux has them: they may not be text.
//!
//! [`Put`]: crate::messages::Put
//! [`Get`]: crate::messages::Get
// Fields of protobuf messages are documented where their names do not explain them.

use prost::Message;

/// The most entries of one page of a directory.
pub const MAX_ENTRIES: u32 = 1000;
/// The most bytes of names and of targets of links in one page.
pub const MAX_PAGE_BYTES: usize = 512 << 10;

/// A page of a directory to list, in the order of the names' bytes.
#[derive(Clone, PartialEq, Message)]
pub struct ListDirectory {
    /// An absolute path. A link is followed.
    #[prost(string, tag = "1")]
    pub path: String,
    /// Only names after this one are listed.
    #[prost(bytes = "vec", tag = "2")]
    pub after: Vec<u8>,
    /// The number of entries, at most [`MAX_ENTRIES`].
    #[prost(uint32, tag = "3")]
    pub limit: u32,
}

/// A page of a directory.
#[derive(Clone, PartialEq, Message)]
pub struct Directory {
    /// The entries, without `.` and `..`.
    #[prost(message, repeated, tag = "1")]
    pub entries: Vec<FileEntry>,
    /// Whether there are more.
    #[prost(bool, tag = "2")]
    pub more: bool,
}

/// The kinds of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum FileKind {
    /// A device, a pipe or a socket.
    Special = 0,
    /// A regular file.
    Regular = 1,
    /// A directory.
    Directory = 2,
    /// A symbolic link.
    Link = 3,
}

/// A file, a directory or a link.
#[derive(Clone, PartialEq, Message)]
pub struct FileEntry {
    /// The last name of its path.
    #[prost(bytes = "vec", tag = "1")]
    pub name: Vec<u8>,
    /// What it is.
    #[prost(enumeration = "FileKind", tag = "2")]
    pub kind: i32,
    /// The size in bytes.
    #[prost(uint64, tag = "3")]
    pub size: u64,
    /// Permission bits.
    #[prost(uint32, tag = "4")]
    pub mode: u32,
    /// The owner's number.
    #[prost(uint32, tag = "5")]
    pub uid: u32,
    /// The group's number.
    #[prost(uint32, tag = "6")]
    pub gid: u32,
    /// When the content was last changed, in milliseconds since 1970.
    #[prost(int64, tag = "7")]
    pub modified_ms: i64,
    /// The target of a link.
    #[prost(bytes = "vec", tag = "8")]
    pub target: Vec<u8>,
}

/// A file to describe.
#[derive(Clone, PartialEq, Message)]
pub struct StatFile {
    /// An absolute path.
    #[prost(string, tag = "1")]
    pub path: String,
    /// Whether the file at the end of links is meant, rather than the link.
    #[prost(bool, tag = "2")]
    pub follow: bool,
}

/// A directory to make.
#[derive(Clone, PartialEq, Message)]
pub struct MakeDirectory {
    /// An absolute path.
    #[prost(string, tag = "1")]
    pub path: String,
    /// Permission bits.
    #[prost(uint32, tag = "2")]
    pub mode: u32,
    /// Owner, as in [`Exec::user`](crate::messages::Exec::user).
    #[prost(string, tag = "3")]
    pub user: String,
    /// Whether directories above it are made, too, and one that exists is no error.
    #[prost(bool, tag = "4")]
    pub parents: bool,
}

/// A file or a directory to remove. Links are not followed.
#[derive(Clone, PartialEq, Message)]
pub struct RemoveFile {
    /// An absolute path.
    #[prost(string, tag = "1")]
    pub path: String,
    /// Whether a directory is removed with its content, except for other file systems in it.
    #[prost(bool, tag = "2")]
    pub recursive: bool,
    /// The most files that are removed; what was removed before stays removed.
    #[prost(uint64, tag = "3")]
    pub limit: u64,
}

/// A file or a directory to rename, within its file system.
#[derive(Clone, PartialEq, Message)]
pub struct RenameFile {
    /// An absolute path.
    #[prost(string, tag = "1")]
    pub from: String,
    /// The new absolute path.
    #[prost(string, tag = "2")]
    pub to: String,
    /// Whether a file that is there already is replaced.
    #[prost(bool, tag = "3")]
    pub replace: bool,
}

/// A part of a file to read.
#[derive(Clone, PartialEq, Message)]
pub struct GetRange {
    /// An absolute path.
    #[prost(string, tag = "1")]
    pub path: String,
    /// Where the part begins, in bytes.
    #[prost(uint64, tag = "2")]
    pub offset: u64,
    /// The most bytes of the part; it ends with the file.
    #[prost(uint64, tag = "3")]
    pub length: u64,
}

/// A directory or a file to send as a tar archive.
#[derive(Clone, PartialEq, Message)]
pub struct Pack {
    /// An absolute path. The names in the archive are relative to it.
    #[prost(string, tag = "1")]
    pub path: String,
}

/// A tar archive to unpack. Nothing outside of the directory is written, whatever the archive's
/// names and links are.
#[derive(Clone, PartialEq, Message)]
pub struct Unpack {
    /// The absolute path of a directory that exists.
    #[prost(string, tag = "1")]
    pub path: String,
    /// Owner of all files, as in [`Exec::user`](crate::messages::Exec::user); empty is the numbers
    /// of the archive.
    #[prost(string, tag = "2")]
    pub user: String,
}

/// A directory or a file to watch.
#[derive(Clone, PartialEq, Message)]
pub struct WatchFiles {
    /// An absolute path.
    #[prost(string, tag = "1")]
    pub path: String,
    /// Whether directories in it are watched, too.
    #[prost(bool, tag = "2")]
    pub recursive: bool,
}

/// The kinds of changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum ChangeKind {
    /// A kind that only a newer agent knows.
    Other = 0,
    /// A file was made.
    Created = 1,
    /// A file's content was changed.
    Modified = 2,
    /// A file that was open for writing was closed.
    Written = 3,
    /// A file was removed.
    Removed = 4,
    /// A file was renamed, and this is its former name.
    MovedAway = 5,
    /// A file was renamed, and this is its new name.
    MovedHere = 6,
    /// A file's permissions, owner or times were changed.
    Attributes = 7,
    /// Changes were lost, because there were too many for their reader.
    Lost = 8,
}

/// A change of a file.
#[derive(Clone, PartialEq, Message)]
pub struct FileChange {
    /// What happened.
    #[prost(enumeration = "ChangeKind", tag = "1")]
    pub kind: i32,
    /// The path, relative to what is watched; empty for that itself.
    #[prost(bytes = "vec", tag = "2")]
    pub path: Vec<u8>,
    /// Whether it is a directory.
    #[prost(bool, tag = "3")]
    pub is_directory: bool,
}
