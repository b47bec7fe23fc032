//! The standby's side: how a changeset becomes the tree.
//!
//! A changeset passes four steps. [`stage`](Standby::stage_batch): its content is written below `.coldspare/stage` of
//! its root, checked against its digests, and made durable. [`commit`](Standby::finish): one transaction of the store
//! records that it will be applied. *Apply*: everything is renamed into place in git's order; each step can be
//! repeated. *Record*: a second transaction makes it the manifest. [`Standby::open`] finishes what was committed, with
//! the same code.
//!
//! Architecture invariants: every file is reached relative to a held descriptor of its root (`coldspare-os`); nothing
//! here knows the network; an acknowledgement is due only after [`Standby::finish`] returned `Ok`.

#![forbid(unsafe_code)]

mod apply;
mod assemble;
mod brakes;
mod bulk;
mod commit;
mod compare;
mod complete;
mod divergence;
mod error;
mod export;
mod given_up;
mod history;
mod inherit;
mod keep;
mod missing;
mod place;
mod points;
mod position;
mod purge;
mod rebuilt;
mod rename;
mod rewind;
mod row;
mod stage;
mod standby;
mod store;
mod tree;
mod unfinished;
mod verify;

pub use brakes::{Answer, Question};
pub use bulk::Answered;
pub use commit::Finished;
pub use compare::Held;
pub use error::{OpenError, StandbyError};
pub use export::Exported;
pub use given_up::GivenUp;
pub use inherit::Found;
pub use missing::Why;
pub use points::{HistoryLimits, Point, PointNo};
pub use position::fitting;
pub use row::{ManifestRow, PendingRow};
pub use standby::{RootSetup, Standby};
pub use store::Store;
pub use verify::{Bookmark, Depth, Extent, Git, GitFindings, Pace, Place, Progress, Repair, Step, Verdict, Verification};
