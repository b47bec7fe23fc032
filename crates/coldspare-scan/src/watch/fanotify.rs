//! The daemon's side of the helper: takes its records and makes hints of them.

use std::io::{BufReader, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::records::Record;
use super::{Shared, WatchError, helper, lock};
use crate::dirty::Hint;

/// A helper that runs. Dropping it ends the helper.
pub struct Helper {
    link: UnixStream,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    ears: Mutex<Ears>,
    changed: Condvar,
}

/// Who is told.
#[derive(Default)]
struct Ears {
    now: Option<Arc<Shared>>,
    /// From the next beginning on.
    next: Option<Arc<Shared>>,
    answer: Option<Answer>,
    is_gone: bool,
}

type Answer = Result<Begun, String>;

/// What is watched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Begun {
    pub(super) filesystems: u32,
    pub(super) unwatched: Vec<(Vec<u8>, String)>,
}

/// How long the helper may take to begin.
const BEGIN_LIMIT: Duration = Duration::from_secs(10);

impl Helper {
    /// Talks to the helper at the other end of `link`, where [`helper::run`] reads.
    ///
    /// # Errors
    /// As `dup`, and the start of a thread.
    pub fn new(link: UnixStream) -> std::io::Result<Helper> {
        let state = Arc::new(State::default());
        let (input, thread_state) = (link.try_clone()?, state.clone());
        std::thread::Builder::new().name("watch".into()).spawn(move || thread_state.listen(input))?;
        Ok(Helper { link, state })
    }

    /// Has everything from now on told to `shared`, and to nobody else.
    pub(super) fn begin(&self, shared: Arc<Shared>) -> Result<Begun, WatchError> {
        let mut ears = lock(&self.state.ears);
        *ears = Ears { next: Some(shared), is_gone: ears.is_gone, ..Ears::default() };
        (&self.link).write_all(&[helper::BEGIN]).map_err(|_| WatchError::Gone)?;
        let deadline = Instant::now() + BEGIN_LIMIT;
        loop {
            if let Some(answer) = ears.answer.take() {
                return answer.map_err(|why| WatchError::Unavailable(format!("fanotify: {why}")));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if ears.is_gone || left.is_zero() {
                return Err(WatchError::Gone);
            }
            ears = self.state.changed.wait_timeout(ears, left).unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }

    /// Tells nobody any more.
    pub(super) fn forget(&self, shared: &Arc<Shared>) {
        let mut ears = lock(&self.state.ears);
        if ears.now.as_ref().is_some_and(|now| Arc::ptr_eq(now, shared)) {
            ears.now = None;
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.link.shutdown(std::net::Shutdown::Both);
    }
}

impl State {
    fn listen(&self, input: UnixStream) {
        let mut input = BufReader::with_capacity(64 << 10, input);
        let why = loop {
            match Record::read(&mut input) {
                Ok(Some(record)) => self.take(record),
                Ok(None) => break "the helper of the watch ended".to_string(),
                Err(e) => break format!("the helper of the watch can't be understood: {e}"),
            }
        };
        let mut ears = lock(&self.ears);
        ears.is_gone = true;
        self.changed.notify_all();
        if let Some(shared) = ears.now.take() {
            shared.gone(&why);
        }
    }

    fn take(&self, record: Record) {
        let mut ears = lock(&self.ears);
        match record {
            Record::Begun { filesystems, unwatched } => {
                ears.now = ears.next.take();
                ears.answer = Some(Ok(Begun { filesystems, unwatched }));
                self.changed.notify_all();
            }
            Record::Failed { why } => {
                ears.answer = Some(Err(why));
                self.changed.notify_all();
            }
            Record::Changed { is_name, dir, name, by } => {
                let Some(shared) = ears.now.clone() else { return };
                drop(ears);
                let hint = if is_name { Hint::Replaced } else { Hint::Changed };
                if shared.take(Path::new(std::ffi::OsStr::from_bytes(&dir)), &name, hint, by) {
                    (shared.wake)();
                }
            }
            Record::Lost { why } => {
                if let Some(shared) = ears.now.clone() {
                    drop(ears);
                    shared.lost(&why);
                }
            }
        }
    }
}
