//! Files and directories in guests, beside the content of single files.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// The most entries of a page of a directory.
pub const MAX_ENTRIES: u32 = 1000;

/// The kind of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Link,
    /// A device, a pipe or a socket.
    Special,
}

/// A file, a directory or a link in a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(example = json!({
    "name": "notes.txt", "kind": "file", "size_bytes": 12, "mode": "644", "uid": 0, "gid": 0,
    "modified_ms": 1764500000000_i64
}))]
pub struct FileEntry {
    /// The last part of the path. What is not UTF-8 in it is replaced, and `lossy` is set.
    pub name: String,
    /// What it is.
    pub kind: FileKind,
    /// The size of the content, in bytes.
    pub size_bytes: u64,
    /// The permissions, in octal.
    pub mode: String,
    /// The number of the owner.
    pub uid: u32,
    /// The number of the group.
    pub gid: u32,
    /// The time at which the content was last changed, in milliseconds since 1970.
    pub modified_ms: i64,
    /// The target of a link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Whether the name or the target is not UTF-8, and was changed in this answer.
    #[serde(default, skip_serializing_if = "is_false")]
    pub lossy: bool,
}

/// Whether a field is left out. Serde passes a reference.
fn is_false(value: &bool) -> bool {
    !value
}

/// A page of a directory, in the order of the names' bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FilePage {
    /// The entries of this page.
    pub entries: Vec<FileEntry>,
    /// The value of `after` that requests the next page. It is absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// The directory to list.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct ListFiles {
    /// The absolute path of the directory in the guest.
    #[param(max_length = 4096)]
    pub path: String,
    /// The maximum number of entries in the response, 1 to 1,000. The default is 1,000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(minimum = 1, maximum = 1000)]
    pub limit: Option<u32>,
    /// The position at which the page begins: the value of `next` in the previous page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(max_length = 1024)]
    pub after: Option<String>,
}

/// The file to describe.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct StatFile {
    /// The absolute path of the file in the guest.
    #[param(max_length = 4096)]
    pub path: String,
    /// Whether the file at the end of links is described, rather than the link. The default is
    /// false.
    #[serde(default)]
    pub follow: bool,
}

/// The file or directory to remove.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct RemoveFile {
    /// The absolute path in the guest. A link is removed, and not what it leads to.
    #[param(max_length = 4096)]
    pub path: String,
    /// Whether a directory is removed with its content, at most 100,000 files at a time. The default
    /// is false.
    #[serde(default)]
    pub recursive: bool,
}

/// A request to make a directory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"path": "/srv/data/in", "parents": true}))]
pub struct MakeDirectory {
    /// The absolute path of the directory in the guest.
    #[schema(max_length = 4096)]
    pub path: String,
    /// The permissions, in octal. The default is `755`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 4)]
    pub mode: Option<String>,
    /// The owner, as a name or a number. The default is root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 256)]
    pub user: Option<String>,
    /// Whether directories above it are made as well, and one that exists is no error. The default
    /// is false.
    #[serde(default)]
    pub parents: bool,
}

/// A request to rename a file or a directory within its file system.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"from": "/srv/new", "to": "/srv/now", "replace": true}))]
pub struct RenameFile {
    /// The absolute path in the guest.
    #[schema(max_length = 4096)]
    pub from: String,
    /// The new absolute path.
    #[schema(max_length = 4096)]
    pub to: String,
    /// Whether a file that is there already is replaced. The default is false.
    #[serde(default)]
    pub replace: bool,
}

/// The place of an archive's content.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct ArchivePath {
    /// The absolute path of a directory in the guest. The names in the archive are relative to it.
    #[param(max_length = 4096)]
    pub path: String,
    /// The owner of all files that are unpacked, as a name or a number. The default is the numbers
    /// in the archive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(max_length = 256)]
    pub user: Option<String>,
}

/// The files to watch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct WatchFiles {
    /// The absolute path of a directory or a file in the guest.
    #[param(max_length = 4096)]
    pub path: String,
    /// Whether directories in it are watched as well, at most 4,096. The default is false.
    #[serde(default)]
    pub recursive: bool,
}

/// What happened to a file that is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FileChangeKind {
    /// The watch has begun: changes from now on are sent.
    Watching,
    /// The file was made.
    Created,
    /// The content of the file was changed.
    Modified,
    /// The file was open for writing, and was closed.
    Written,
    /// The file was removed.
    Removed,
    /// The file was renamed, and this is its former path.
    MovedAway,
    /// The file was renamed, and this is its new path.
    MovedHere,
    /// The permissions, the owner or the times of the file were changed.
    Attributes,
    /// Changes were lost, because there were more than the client has read.
    Lost,
    /// Something that this release does not know.
    Other,
}

/// A change of a file that is watched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(example = json!({"kind": "written", "path": "sub/file", "directory": false}))]
pub struct FileChange {
    /// What happened.
    pub kind: FileChangeKind,
    /// The path, relative to what is watched; empty for that itself. What is not UTF-8 in it is
    /// replaced.
    pub path: String,
    /// Whether it is a directory.
    pub directory: bool,
}
