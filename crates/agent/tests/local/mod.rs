//! An agent on this host, over a Unix socket, and the tokio client of it.
// Each test program uses its part of it.
#![allow(dead_code, unreachable_pub)]

use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use agent_client::{AgentSocket, ClientError, Connection, Deadline};
use agent_proto::messages::{ErrorCode, Unpack};
use tokio::net::UnixStream;

pub const LIMIT: Duration = Duration::from_secs(60);

pub struct Agent {
    process: Child,
    folder: tempfile::TempDir,
}

impl Agent {
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_clone-agent"))
            .arg("--listen")
            .arg(format!("unix:{}", folder.path().join("agent").display()))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // Its first line says that it listens.
        let mut line = [0; 20];
        let stderr = process.stderr.as_mut().unwrap();
        stderr.read_exact(&mut line).unwrap();
        fs::create_dir(folder.path().join("root")).unwrap();
        Self { process, folder }
    }

    pub async fn connect(&self) -> Connection {
        let stream = UnixStream::connect(self.folder.path().join("agent"));
        let socket = AgentSocket::new(stream.await.unwrap());
        let connection = Connection::greet(socket, Deadline::after(LIMIT)).await;
        connection.unwrap()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("root").join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    pub async fn unpack(&self, into: &str, archive: &[u8]) -> Result<(), ClientError> {
        let request = Unpack {
            path: self.text(into),
            user: String::new(),
        };
        let mut upload = self.connect().await.unpack(request)?;
        for piece in archive.chunks(1000) {
            if !upload.write(piece).await? {
                break;
            }
        }
        upload.finish().await
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

pub fn refusal<T>(result: Result<T, ClientError>) -> (ErrorCode, String) {
    match result {
        Err(ClientError::Refused(error)) => (error.code(), error.message),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("not refused"),
    }
}
