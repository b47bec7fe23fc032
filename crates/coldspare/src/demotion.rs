//! From a fenced active to a standby (R6): its home becomes the tree of a manifest.
//!
//! All that the home holds is looked at once more, and what changed since the last capture is read, so that nothing of it
//! is taken for what the new active has; then the manifest is made of the index, and the role changes. Nothing in the home
//! is altered. Each step may be taken again; the role changes last.

use std::time::{Duration, Instant};

use coldspare_core::changeset::{Ask, FilePart, Have};
use coldspare_core::control::{Applied, ControlRecord, Event, Role};
use coldspare_core::{Baseline, Op, Seq};
use coldspare_delta::Packed;
use coldspare_os::{Disk, RealDisk};
use coldspare_scan::capture::{Capture, Certainty, Closed, Cycle, Outlet, Work};
use coldspare_scan::index::IndexError;
use coldspare_standby::{Found, ManifestRow, OpenError, Store};

use crate::active::{index_failure, open_scan};
use crate::config::Config;
use crate::exit::Failure;
use crate::role::{self, NotTaken};
use crate::state::State;

/// How often the home is looked at until nothing changes in it.
const LOOKS_MAX: usize = 3;
/// How long the index may be in use.
const OPENED_LIMIT: Duration = Duration::from_secs(20);

/// Makes this host, which is fenced, a standby.
///
/// Cost: one `statx` an entry, a read of what changed since the last capture, a write of the manifest.
///
/// # Errors
/// `Usage`: a daemon runs, or something writes the home; `Damage`: a store or the disk fails. The host is fenced still.
pub(crate) fn demote(config: &Config, state: &State) -> Result<(), Failure> {
    let _lock = state.lock()?;
    let record = state.control()?;
    if record.role == Role::Fenced {
        tracing::info!("all of the home is looked at, to become the standby's tree");
        let capture = opened(config, state, &record)?;
        let seq = look(&capture)?;
        let digest = capture.index.fingerprint().map_err(index_failure)?;
        let place =
            record.place_after_demotion(digest, seq).ok_or_else(|| Failure::damage("the control record has no session of its own"))?;
        // As of when it is what counts nobody knows before the new active was met, which has written since.
        make_manifest(state, &capture, Some(Applied { session: place.session, seq: place.seq, as_of_ms: 0 }))?;
    }
    role::take(config, state, &record, Event::Demote).map_err(NotTaken::into_failure)?;
    // What it knows ends here: the manifest goes on.
    state.remove_store(&state.index_path())
}

/// What it takes to look at the home; the daemon that this process was may hold its index for a moment.
fn opened(config: &Config, state: &State, record: &ControlRecord) -> Result<Capture<RealDisk>, Failure> {
    let since = Instant::now();
    loop {
        match open_scan(config, state, record) {
            Err(failure) if failure.passes && since.elapsed() < OPENED_LIMIT => std::thread::sleep(Duration::from_millis(20)),
            opened => return opened,
        }
    }
}

/// Brings the index up to what the home is, and both to the disk; the changeset that it is.
///
/// # Errors
/// `Usage`: something writes the home; `Damage`.
pub(crate) fn look<D: Disk>(capture: &Capture<D>) -> Result<Seq, Failure> {
    for _ in 0..LOOKS_MAX {
        let seq = capture.index.next_seq().map_err(index_failure)?;
        let cycle = Cycle {
            seq,
            baseline: Baseline::Delta(Seq(seq.0 - 1)),
            certainty: Certainty::Sure,
            work: Work::Everything,
            literal: Default::default(),
        };
        let (_, report) = capture.run(cycle, &Nowhere);
        let report = report.map_err(Failure::damage)?;
        if !report.is_left {
            // What a manifest says is on disk has to stay there.
            for root in &capture.roots {
                capture.disk.sync_fs(&root.dir).map_err(|e| Failure::damage(format!("{}: can't be synced: {e}", root.path.display())))?;
            }
            return Ok(seq);
        }
    }
    Err(Failure::usage("something writes the home: stop the application on this host, and try again"))
}

/// Makes the manifest of the index.
///
/// # Errors
/// `Damage`: there is the one that there was.
pub(crate) fn make_manifest<D: Disk>(state: &State, capture: &Capture<D>, applied: Option<Applied>) -> Result<(), Failure> {
    // The store wants rows one by one, the index gives them: a thread passes them on.
    let (rows, inbox) = std::sync::mpsc::sync_channel::<Result<Found, RowError>>(1024);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let each = |root, path, entry, ino| -> Result<(), RowError> {
                // What is held back isn't known for certain: as if nobody had put it there. The folders that it is in are known:
                // without them all that they hold would go to quarantine, though the manifest has it.
                if capture.held.holds(root, &path) && !path.is_root() {
                    return Ok(());
                }
                // Whoever listened has failed already.
                let _ = rows.send(Ok((root, path, ManifestRow { entry, ino })));
                Ok(())
            };
            if let Err(e) = capture.index.for_each_present(each) {
                let _ = rows.send(Err(e));
            }
        });
        Store::make_of(&state.manifest_path(), applied, inbox.into_iter())
    })
    .map_err(|e: RowError| match e {
        RowError::Index(e) => index_failure(e),
        RowError::Store(e) => Failure::damage(e),
    })
}

enum RowError {
    Index(IndexError),
    Store(OpenError),
}

impl From<IndexError> for RowError {
    fn from(e: IndexError) -> RowError {
        RowError::Index(e)
    }
}

impl From<OpenError> for RowError {
    fn from(e: OpenError) -> RowError {
        RowError::Store(e)
    }
}

/// Nobody is to be told.
struct Nowhere;

impl Outlet for Nowhere {
    fn batch(&self, _: Vec<Op>, _: Packed, _: usize) -> Result<(), Closed> {
        Ok(())
    }

    fn segment(&self, _: FilePart, _: Packed, _: usize) -> Result<(), Closed> {
        Ok(())
    }

    fn ask(&self, items: Vec<Ask>) -> Result<Vec<Have>, Closed> {
        Ok(vec![Have::Missing; items.len()])
    }
}
