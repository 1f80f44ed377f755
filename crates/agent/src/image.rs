//! The defaults of commands from the guest's container image.
//!
//! `clone image build` writes the description for container images. A command without a user,
//! directory, environment or even arguments gets those of the image, as from a container engine;
//! values in the request take precedence. The agent's own work (identity, files, power) does not
//! use them.

use std::io;
use std::path::Path;

use agent_proto::messages::{ErrorCode, Exec};
use serde::Deserialize;

use crate::conversation::Refusal;

/// The path of the image's description (written by `clone-image`'s `guest.rs`).
const DESCRIPTION: &str = "/etc/clone/image.json";
/// More than any image's; what is larger is refused, not read.
const MAX_BYTES: u64 = 1 << 20;

/// The part of the description that is about commands. What else there is, or will be, is passed over.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Image {
    env: Vec<String>,
    working_dir: String,
    user: String,
    entrypoint: Vec<String>,
    cmd: Vec<String>,
}

impl Image {
    /// Reads this guest's description; an empty one if there is none.
    pub(crate) fn of_this_guest() -> Result<Self, Refusal> {
        Self::read(Path::new(DESCRIPTION))
    }

    fn read(path: &Path) -> Result<Self, Refusal> {
        let cannot =
            |error: &io::Error| Refusal::io(format!("cannot read {}", path.display()), error);
        let bytes = match std::fs::metadata(path) {
            Ok(meta) if meta.len() > MAX_BYTES => {
                let error = io::Error::from(io::ErrorKind::FileTooLarge);
                return Err(cannot(&error));
            }
            Ok(_) => std::fs::read(path).map_err(|error| cannot(&error))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(cannot(&error)),
        };
        serde_json::from_slice(&bytes).map_err(|error| {
            let message = format!("{} in the guest is damaged: {error}", path.display());
            Refusal::new(ErrorCode::Invalid, message)
        })
    }

    /// Fills in the fields that `request` leaves empty.
    pub(crate) fn fill(self, request: &mut Exec) {
        let Self {
            env,
            working_dir,
            user,
            entrypoint,
            cmd,
        } = self;
        // Later variables replace earlier ones. A variable without a name is an error of the image,
        // not of the caller, so it is skipped.
        let named = |pair: &String| pair.find('=').is_some_and(|at| at > 0);
        let env = env.into_iter().filter(named);
        request.environment = env.chain(request.environment.drain(..)).collect();
        if request.command.is_empty() {
            request.command = entrypoint.into_iter().chain(cmd).collect();
        }
        if request.user.is_empty() {
            request.user = user;
        }
        // Container engines make a directory that is missing; here the home will do.
        if request.directory.is_empty() && Path::new(&working_dir).is_dir() {
            request.directory = working_dir;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(directory: &Path) -> Image {
        let text = format!(
            r#"{{"format": 1, "source": "x", "init": "agent", "env": ["A=1", "B=2", "=", "C"],
                "working_dir": {directory:?}, "user": "ada:users", "entrypoint": ["/run.sh"],
                "cmd": ["serve", "now"], "stop_signal": "SIGTERM"}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn a_caller_that_says_nothing_gets_what_the_image_says() {
        let dir = tempfile::tempdir().unwrap();
        let mut request = Exec::default();
        image(dir.path()).fill(&mut request);
        assert_eq!(request.command, ["/run.sh", "serve", "now"]);
        assert_eq!(request.environment, ["A=1", "B=2"]);
        assert_eq!(request.user, "ada:users");
        assert_eq!(Path::new(&request.directory), dir.path());
    }

    #[test]
    fn what_the_caller_says_wins() {
        let dir = tempfile::tempdir().unwrap();
        let said = Exec {
            command: vec!["true".to_owned()],
            environment: vec!["B=3".to_owned()],
            user: "root".to_owned(),
            directory: "/".to_owned(),
            ..Exec::default()
        };
        let mut request = said.clone();
        image(dir.path()).fill(&mut request);
        // The environment's later words win over earlier ones.
        assert_eq!(request.environment, ["A=1", "B=2", "B=3"]);
        let environment = said.environment.clone();
        assert_eq!(
            Exec {
                environment,
                ..request
            },
            said
        );
    }

    #[test]
    fn a_directory_that_is_missing_is_left_to_the_users_home() {
        let mut request = Exec::default();
        image(Path::new("/nowhere/at/all")).fill(&mut request);
        assert_eq!(request.directory, "");
    }

    #[test]
    fn no_description_says_nothing_and_a_damaged_one_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image.json");
        let mut request = Exec::default();
        Image::read(&path).unwrap().fill(&mut request);
        assert_eq!(request, Exec::default());
        for damaged in ["{\"env\": 5}".to_owned(), " ".repeat(2 << 20)] {
            std::fs::write(&path, damaged).unwrap();
            assert!(Image::read(&path).is_err());
        }
    }
}
