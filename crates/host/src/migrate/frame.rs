//! The launchers' messages: a length of four bytes, little endian, and as many bytes of JSON.

use std::time::Duration;

use clone_api::{ApiError, ErrorCode};
use clone_migration::Link;
use clone_start::error::Result;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The largest message that is read, in bytes.
const MAX_BYTES: usize = 1 << 20;
/// The longest time until the other side answers, which may have to verify a template first.
pub(super) const PATIENCE: Duration = Duration::from_secs(600);

/// Sends a message.
///
/// # Errors
/// [`ErrorCode::Unavailable`] if the connection fails.
pub(super) fn write(link: &mut Link, message: &impl Serialize) -> Result<()> {
    let text = serde_json::to_vec(message).map_err(|error| ApiError::internal(&error))?;
    let mut bytes = (text.len() as u32).to_le_bytes().to_vec();
    bytes.extend(text);
    link.write_all(&bytes).map_err(|(_, error)| broken(&error))
}

/// Reads a message, and no byte after it.
///
/// # Errors
/// [`ErrorCode::Unavailable`] if the connection fails, [`ErrorCode::BadRequest`] for something else
/// than a message.
pub(super) fn read<T: DeserializeOwned>(link: &mut Link) -> Result<T> {
    let mut len = [0; 4];
    link.read_exact(&mut len).map_err(|error| broken(&error))?;
    let len = u32::from_le_bytes(len) as usize;
    let unreadable = |reason: String| {
        let message = format!("what came from the other host is not of a migration: {reason}");
        ApiError::new(ErrorCode::BadRequest, message).advise(
            "both hosts need the same version of clone, and nothing on the way may print anything",
        )
    };
    if len > MAX_BYTES {
        return Err(unreadable(format!("a message of {len} bytes")));
    }
    let mut text = vec![0; len];
    link.read_exact(&mut text).map_err(|error| broken(&error))?;
    serde_json::from_slice(&text).map_err(|error| unreadable(error.to_string()))
}

fn broken(error: &std::io::Error) -> ApiError {
    let message = format!("the connection to the other host failed: {error}");
    ApiError::new(ErrorCode::Unavailable, message)
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    /// Two ends that are connected.
    pub(in super::super) fn links() -> (Link, Link) {
        let (a, b) = UnixStream::pair().unwrap();
        let link = |stream: UnixStream| {
            let other = stream.try_clone().unwrap();
            Link::new(stream.into(), other.into(), Duration::from_secs(20)).unwrap()
        };
        (link(a), link(b))
    }

    #[test]
    fn messages_follow_each_other_and_noise_is_refused_with_advice() {
        let (mut a, mut b) = links();
        write(&mut a, &"one").unwrap();
        write(&mut a, &2).unwrap();
        assert_eq!(read::<String>(&mut b).unwrap(), "one");
        assert_eq!(read::<u32>(&mut b).unwrap(), 2);
        a.write_all(b"Welcome to Debian!\n").unwrap();
        let refused = read::<String>(&mut b).unwrap_err();
        assert_eq!(refused.code, ErrorCode::BadRequest);
        assert!(refused.advice.unwrap().contains("nothing on the way"));
        drop(a);
        let (mut a, mut b) = links();
        a.write_all(&9_u32.to_le_bytes()).unwrap();
        drop(a);
        let ended = read::<String>(&mut b).unwrap_err();
        assert_eq!(ended.code, ErrorCode::Unavailable);
    }
}
