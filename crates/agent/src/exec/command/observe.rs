//! Sessions that read a command's output beside the attached one. The command does not wait for
//! them: a slow one loses output.

use agent_proto::CHUNK;
use agent_proto::messages::Acknowledge;

use super::{Command, Piece, STREAMS};

/// A session that reads beside the attached one.
pub(in crate::exec) struct Observer {
    pub(in crate::exec) number: u64,
    cursors: [u64; 2],
}

impl Command {
    /// Adds a session that reads beside the attached one.
    pub(in crate::exec) fn observe(&self, arrived: Acknowledge) -> Observer {
        let mut shared = self.lock();
        // As many connections are never made.
        shared.last_seat = shared.last_seat.saturating_add(1);
        let number = shared.last_seat;
        shared.observers.insert(number);
        Observer {
            number,
            cursors: [arrived.stdout_cursor, arrived.stderr_cursor],
        }
    }

    pub(in crate::exec) fn stop_observing(&self, number: u64) {
        self.lock().observers.remove(&number);
        self.changed.notify_all();
    }

    /// Waits for the next event of a session that reads beside the attached one.
    pub(in crate::exec) fn next_observed(&self, observer: &mut Observer) -> Piece {
        let mut shared = self.lock();
        loop {
            if !shared.observers.contains(&observer.number) {
                return Piece::Replaced;
            }
            let cursors = observer.cursors.iter_mut().zip(STREAMS);
            for (spool, (position, stream)) in shared.spools.iter().zip(cursors) {
                if let Some((cursor, data)) = spool.peek(*position, CHUNK) {
                    *position = cursor + data.len() as u64;
                    return Piece::Output {
                        stream,
                        cursor,
                        data,
                    };
                }
            }
            let mut spools = shared.spools.iter().zip(observer.cursors);
            if let Some(exited) = shared.exited
                && spools.all(|(spool, cursor)| spool.is_finished_at(cursor))
            {
                return Piece::Exited(exited);
            }
            shared = self.wait(shared);
        }
    }
}
