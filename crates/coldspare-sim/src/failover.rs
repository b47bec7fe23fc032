//! Two nodes that change roles, for a model checker: every order of messages, crashes, promotions and switchovers within
//! bounds.
//!
//! What a node decides is `coldspare_core::control::step`, as in the daemons; here is what they do around it, with one
//! number for each write of the application, a disk of which only a part is durable, and a network that loses, repeats and
//! reorders.
//!
//! - [`node`]: a node, what it has in memory and on disk, and what it has still to do.
//! - [`model`]: what may happen, within bounds.
//! - [`property`]: what has to hold, and what has to be possible.
//! - [`mod@walk`]: long ways through it, by seeds.

pub mod model;
pub mod node;
pub mod property;
pub mod walk;

pub use model::{Action, Bounds, Defect, Message, Model, State};
pub use node::Node;
pub use property::{Broken, Explored, explore};
pub use walk::{Change, Failed, Walked, walk};
