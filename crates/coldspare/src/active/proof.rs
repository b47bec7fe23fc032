//! Goes over all of the home beside the cycles, at an even pace and at idle priority, for what the watch missed.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use coldspare_core::{RelPath, RootId};
use coldspare_os::RealDisk;
use coldspare_scan::capture::{Capture, CaptureError};
use coldspare_scan::dirty::Hint;
use coldspare_scan::proof::Verdict;
use coldspare_scan::watch::now_ms;

/// What the proofs so far amount to.
#[derive(Debug, Default)]
pub(super) struct Proofs {
    /// Times that all of the home was gone over.
    pub(super) passes: AtomicU64,
    /// What the watch missed.
    pub(super) missed: AtomicU64,
    /// When the last pass began that is over, in milliseconds since 1970; 0 before.
    pub(super) as_of_ms: AtomicU64,
}

/// The thread that goes over the home; it ends when this is dropped.
pub(super) struct Prover {
    pub(super) proofs: Arc<Proofs>,
    stops: Arc<AtomicBool>,
}

/// What differs is looked at again after this time, so that its event may come.
const GRACE: Duration = Duration::from_secs(1);
/// LIMIT: paths that differ and wait for that; the pass waits with them.
const SUSPECTS_MAX: usize = 1_000;
/// Entries a second at least.
const PACE_MIN: u64 = 200;
/// LIMIT: how long the thread sleeps before it looks whether it is to stop.
const NAP: Duration = Duration::from_millis(100);

impl Prover {
    /// Starts to go over the home every `every`; `wake` is called when something was missed, which is hinted then.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(super) fn start(capture: Arc<Capture<RealDisk>>, every: Duration, wake: Arc<tokio::sync::Notify>) -> std::io::Result<Prover> {
        let prover = Prover { proofs: Arc::default(), stops: Arc::default() };
        let task = Task { capture, every, wake, proofs: prover.proofs.clone(), stops: prover.stops.clone() };
        std::thread::Builder::new().name("proof".into()).spawn(move || task.run())?;
        Ok(prover)
    }
}

impl Drop for Prover {
    fn drop(&mut self) {
        self.stops.store(true, Ordering::Relaxed);
    }
}

struct Task {
    capture: Arc<Capture<RealDisk>>,
    every: Duration,
    wake: Arc<tokio::sync::Notify>,
    proofs: Arc<Proofs>,
    stops: Arc<AtomicBool>,
}

/// A path that differed, and when it is to be looked at again.
struct Suspect {
    root: RootId,
    path: RelPath,
    at: Instant,
}

impl Task {
    fn run(&self) {
        if let Err(e) = coldspare_os::set_idle_io_priority() {
            tracing::info!(error = %e, "the proof of the watch has the usual I/O priority");
        }
        while !self.stops() {
            let (began, began_ms) = (Instant::now(), now_ms());
            if self.can_begin() {
                match self.pass(began) {
                    Ok(true) => {
                        self.proofs.as_of_ms.store(began_ms, Ordering::Relaxed);
                        self.proofs.passes.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(false) => {}
                    Err(_) if self.stops() => {}
                    Err(e) => tracing::warn!(error = %e, "the watch could not be proved; it is tried again"),
                }
                self.sleep_until(began + self.every);
            } else {
                self.sleep_until(began + GRACE);
            }
        }
    }

    /// Before the first look at everything, and while the watch doesn't claim to see all, there is nothing to prove.
    fn can_begin(&self) -> bool {
        let is_whole = self.capture.watch.as_ref().is_some_and(|w| !w.is_stale() && w.coverage().unwatched == 0);
        is_whole && self.capture.turns.ended().is_some_and(|turns| turns > 0)
    }

    /// Goes over the home once; `false` when it was stopped before the end.
    fn pass(&self, began: Instant) -> Result<bool, CaptureError> {
        let entries = self.capture.index.snapshot()?.path_count()?;
        let pace = (entries / self.every.as_secs().max(1)).max(PACE_MIN);
        let mut suspects = VecDeque::new();
        let (mut after, mut done) = (None, 0_u64);
        while let Some(step) = self.capture.prove_next(after.as_ref())? {
            let at = Instant::now() + GRACE;
            suspects.extend(step.differing.into_iter().map(|path| Suspect { root: step.dir.0, path, at }));
            done += step.entries;
            after = Some(step.dir);
            self.sleep_until(began + Duration::from_millis(done.saturating_mul(1_000) / pace));
            self.judge(&mut suspects, SUSPECTS_MAX)?;
            if self.stops() {
                return Ok(false);
            }
        }
        self.judge(&mut suspects, 0)?;
        Ok(!self.stops())
    }

    /// Looks at those again that are due; waits until at most `rest` are left.
    fn judge(&self, suspects: &mut VecDeque<Suspect>, rest: usize) -> Result<(), CaptureError> {
        while let Some(first) = suspects.front()
            && (first.at <= Instant::now() || suspects.len() > rest)
            && !self.stops()
        {
            self.sleep_until(first.at);
            let Some(Suspect { root, path, .. }) = suspects.pop_front() else { break };
            match self.capture.judge(root, &path)? {
                Verdict::Known => {}
                Verdict::Unclear => suspects.push_back(Suspect { root, path, at: Instant::now() + GRACE }),
                Verdict::Missed => self.missed(root, &path),
            }
        }
        Ok(())
    }

    fn missed(&self, root: RootId, path: &RelPath) {
        self.proofs.missed.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(path = %path, "the watch missed a change; it is sent now");
        if let Some(watch) = &self.capture.watch {
            watch.dirty().add(root, path.parent().unwrap_or_else(RelPath::root), path.name(), Hint::Replaced, now_ms());
        }
        self.wake.notify_one();
    }

    fn stops(&self) -> bool {
        self.stops.load(Ordering::Relaxed)
    }

    fn sleep_until(&self, at: Instant) {
        while !self.stops() {
            let left = at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(NAP));
        }
    }
}
