//! Directories and files of a guest: what there is, and what happens to it.

use agent_proto::deadline::ByteLimit;
use agent_proto::exchange::{self, IncomingFile, Timing};
use agent_proto::messages::{
    Directory, FileChange, FileEntry, GetRange, ListDirectory, MakeDirectory, Pack, RemoveFile,
    RenameFile, StatFile, WatchFiles, request::Operation,
};

use crate::wire::Wire;
use crate::{Connection, Download, Result};

impl Connection {
    /// A page of a directory.
    pub async fn list_directory(mut self, request: ListDirectory) -> Result<Directory> {
        exchange::directory(self.request(Operation::ListDirectory(request)).await?)
    }

    /// Describes a file, a directory or a link.
    pub async fn stat(mut self, request: StatFile) -> Result<FileEntry> {
        exchange::entry(self.request(Operation::StatFile(request)).await?)
    }

    /// Makes a directory.
    pub async fn make_directory(mut self, request: MakeDirectory) -> Result<()> {
        exchange::done(self.request(Operation::MakeDirectory(request)).await?)
    }

    /// Removes a file or a directory.
    pub async fn remove(mut self, request: RemoveFile) -> Result<()> {
        exchange::done(self.request(Operation::RemoveFile(request)).await?)
    }

    /// Renames a file or a directory.
    pub async fn rename(mut self, request: RenameFile) -> Result<()> {
        exchange::done(self.request(Operation::RenameFile(request)).await?)
    }

    /// Reads a part of a file. [`Download::info`] has the size of the whole.
    pub async fn get_range(mut self, request: GetRange) -> Result<Download> {
        let limit = ByteLimit::new(request.length);
        let answer = self.request(Operation::GetRange(request)).await?;
        let file = IncomingFile::begin(answer, limit)?;
        Ok(Download::new(self.wire, file))
    }

    /// Reads a directory as a tar archive of at most `limit` bytes.
    pub async fn pack(mut self, request: Pack, limit: ByteLimit) -> Result<Download> {
        let answer = self.request(Operation::Pack(request)).await?;
        let file = IncomingFile::begin(answer, limit)?;
        Ok(Download::new(self.wire, file))
    }

    /// Watches a directory or a file. The deadline is for the beginning only.
    pub async fn watch(mut self, request: WatchFiles) -> Result<FileWatch> {
        exchange::watching(self.request(Operation::WatchFiles(request)).await?)?;
        self.wire.set_timing(Timing::Stream);
        Ok(FileWatch { wire: self.wire })
    }
}

/// Files of the guest that are watched, until this value is dropped.
pub struct FileWatch {
    wire: Wire,
}

impl FileWatch {
    /// The next change, which may be long in coming; `None` when what is watched is gone. Changes
    /// that are not read make the guest drop later ones.
    ///
    /// # Errors
    /// Where the connection is lost.
    pub async fn next(&mut self) -> Result<Option<FileChange>> {
        exchange::file_change(self.wire.receive().await?)
    }
}
