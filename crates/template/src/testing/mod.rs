//! What unit tests and fuzz targets share: templates of machines that never were, and a recorder of
//! what code touches on its host.

mod hostile;
mod place;
mod recorder;
mod tamper;

pub use hostile::{Dice, as_format_1, make_hostile};
pub use place::{Place, RAM, device_state};
pub use recorder::{Access, Bounds, record};
pub use tamper::{rewrite, rewrite_text, tamper};

/// The oldest format of a manifest that is read.
pub const FORMAT_1: u32 = crate::migrate::FORMAT_1;
