//! What unit tests and fuzz targets share: templates of machines that never were, and a recorder of
//! what code touches on its host.

mod fork;
mod hostile;
mod place;
mod recorder;

pub use fork::{fork, travel};
pub use hostile::{Dice, as_format_1, make_hostile};
pub use place::{Place, RAM, device_state};
pub use recorder::{Access, Bounds, record};
