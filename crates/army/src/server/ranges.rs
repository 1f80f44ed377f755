//! Parts of files, as HTTP's `Range` header requests them (RFC 9110, section 14).

use agent_client::{ByteLimit, Connection};
use agent_proto::messages::{GetRange, StatFile};
use army_api::{Problem, ProblemKind};
use army_controller::Error;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::auth::Caller;
use super::downloads::body;
use super::failure::Failure;
use super::sessions::Guest;
use super::{Answer, App};

/// The tag of the operation in the agent's protocol that reads a part of a file.
const GET_RANGE: u32 = 17;

/// A part of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Range {
    /// From a position on, and at most so many bytes.
    From(u64, u64),
    /// The last bytes.
    Last(u64),
}

/// The one range that a request is for. Several ranges, other units and what cannot be read are
/// ignored, as the standard has it.
pub(super) fn requested(headers: &HeaderMap) -> Option<Range> {
    let text = headers.get(header::RANGE)?.to_str().ok()?;
    let (first, last) = text.strip_prefix("bytes=")?.trim().split_once('-')?;
    if first.is_empty() {
        return last.parse().ok().map(Range::Last);
    }
    let first: u64 = first.parse().ok()?;
    if last.is_empty() {
        return Some(Range::From(first, u64::MAX));
    }
    let last: u64 = last.parse().ok()?;
    let length = last.checked_sub(first)?.saturating_add(1);
    Some(Range::From(first, length))
}

/// Whether the agent can read parts of files. Older agents cannot, and send the whole.
pub(super) fn is_supported(connection: &Connection) -> bool {
    connection.hello().operations.contains(&GET_RANGE)
}

/// The size of a file.
pub(super) async fn size(connection: Connection, path: &str) -> Answer<u64> {
    let request = StatFile {
        path: path.to_owned(),
        follow: true,
    };
    Ok(connection.stat(request).await.map_err(Error::from)?.size)
}

impl Range {
    /// The position and the length; `size` is the file's.
    pub(super) fn place(self, size: u64) -> (u64, u64) {
        match self {
            Self::From(first, length) => (first, length),
            Self::Last(count) => (size.saturating_sub(count), count),
        }
    }
}

/// Reads a part of a file. A part of which there is nothing is refused with the file's size.
pub(super) async fn read(
    app: &App,
    caller: &Caller,
    guest: Guest,
    path: &str,
    (offset, length): (u64, u64),
    most: ByteLimit,
) -> Answer<Response> {
    let request = GetRange {
        path: path.to_owned(),
        offset,
        length: length.min(most.bytes()),
    };
    let length = request.length;
    let Guest { connection, ending } = guest;
    let download = connection.get_range(request).await.map_err(Error::from)?;
    let size = download.info().size;
    if offset >= size || length == 0 {
        return Ok(refusal(size));
    }
    let length = length.min(size - offset);
    let range = format!("bytes {offset}-{}/{size}", offset + length - 1);
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_RANGE, range),
        (header::CONTENT_LENGTH, length.to_string()),
    ];
    let body = body(app, caller, download, ending).await?;
    Ok((StatusCode::PARTIAL_CONTENT, headers, body).into_response())
}

fn refusal(size: u64) -> Response {
    let detail = format!("the file has {size} bytes, and nothing of the range");
    let mut problem = Problem::new(ProblemKind::InvalidRequest, detail);
    problem.status = StatusCode::RANGE_NOT_SATISFIABLE.as_u16();
    let mut response = Failure(problem).into_response();
    if let Ok(value) = format!("bytes */{size}").parse() {
        response.headers_mut().insert(header::CONTENT_RANGE, value);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_range_is_read_and_everything_else_is_ignored() {
        let range = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::RANGE, text.parse().unwrap());
            requested(&headers)
        };
        assert_eq!(range("bytes=0-9"), Some(Range::From(0, 10)));
        assert_eq!(range("bytes=5-"), Some(Range::From(5, u64::MAX)));
        assert_eq!(range("bytes=-7"), Some(Range::Last(7)));
        let most = format!("bytes=0-{}", u64::MAX);
        assert_eq!(range(&most), Some(Range::From(0, u64::MAX)));
        for ignored in ["bytes=9-0", "bytes=0-1,3-4", "lines=0-9", "bytes=a-b", "x"] {
            assert_eq!(range(ignored), None, "{ignored}");
        }
        assert_eq!(Range::Last(7).place(10), (3, 7));
        assert_eq!(Range::Last(70).place(10), (0, 70));
    }
}
