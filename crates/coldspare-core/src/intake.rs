//! The standby's side of a session as a state machine: which frame is staged, what waits, when a changeset is applied,
//! what the active is told.
//!
//! Frames of a changeset may arrive before its `Begin` and after its `End`: the first wait, the changeset ends when all
//! that `End` counted has come. Frames of a changeset that is over are dropped.
//!
//! The active may go on to the next changeset before it hears of the last: its `Begin` waits until that one is applied.
//!
//! Decides; performs nothing. Inputs come through [`Intake::handle`], what is to be done comes out of
//! [`Intake::poll_effect`] until it is `None`; the outcome of each effect comes back as an input. A message of the
//! control stream is given to it only while [`Intake::takes_messages`], a frame of a data stream only once the one before
//! it was staged or dropped: the driver waits, and so the active does.
//!
//! It must not know content, sockets, files or time; `F` is a failure that it passes on.
//!
//! Invariants:
//! - at most one frame a stream is held;
//! - a changeset begins, and is given up, only while nothing is staged or applied;
//! - it is applied once, when all that `End` counted was staged without a failure, and acknowledged only then (G3);
//! - each changeset that was begun is answered at most once, and what was applied or failed is told, whether or not it
//!   was given up meanwhile.

use std::collections::{BTreeMap, VecDeque};

use crate::changeset::{Baseline, Totals};
use crate::control::Applied;
use crate::id::Seq;
use crate::seeded_bug;

/// A data stream of the session, by any number that is its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct StreamNo(pub u64);

/// What a frame is, as `End` counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// Operations with the content of small files.
    Batch,
    /// A stretch of a large file.
    Segment,
}

/// What a changeset amounts to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// Its number.
    pub seq: Seq,
    /// Milliseconds since 1970 on the active's clock.
    pub as_of_ms: u64,
    /// Batches that were sent.
    pub batches: u64,
    /// Segments that were sent.
    pub segments: u64,
    /// What both ends compare.
    pub totals: Totals,
}

/// What happened.
#[derive(Debug)]
pub enum Input<F> {
    /// The active announces a changeset; one that is under way is given up.
    Begin {
        /// Its number.
        seq: Seq,
        /// What it starts from.
        baseline: Baseline,
        /// The last changeset of which the active knew then what became of it.
        acked: Seq,
    },
    /// The outcome of [`Effect::Begin`].
    Begun(Result<(), F>),
    /// A frame arrived; it waits for an effect of its stream.
    Arrived {
        /// Where.
        stream: StreamNo,
        /// The changeset that it belongs to.
        seq: Seq,
        /// What it is.
        kind: FrameKind,
    },
    /// The outcome of [`Effect::Stage`].
    Staged {
        /// Where the frame came from.
        stream: StreamNo,
        /// Whether its content is staged.
        result: Result<(), F>,
    },
    /// The active has sent all of the changeset.
    End(End),
    /// The active gives the changeset up.
    Abandon {
        /// The changeset.
        seq: Seq,
    },
    /// [`Effect::Abandon`] was performed.
    Abandoned,
    /// The outcome of [`Effect::Finish`].
    Finished(Result<Applied, F>),
    /// The link is gone: no further frame is let in, and what was begun is given up.
    Closed,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect<F> {
    /// Begin to stage a changeset.
    Begin {
        /// Its number.
        seq: Seq,
        /// What it starts from.
        baseline: Baseline,
        /// The last changeset of which the active knew then what became of it.
        acked: Seq,
    },
    /// Stage the frame that this stream holds.
    Stage {
        /// The stream.
        stream: StreamNo,
    },
    /// Drop the frame that this stream holds and let it read on.
    Drop {
        /// The stream.
        stream: StreamNo,
    },
    /// Commit and apply the changeset, all of which is staged.
    Finish(End),
    /// End the staging of what was begun; what is staged may be kept.
    Abandon,
    /// Tell the active that all of the changeset is durable.
    Acked(Applied),
    /// Tell the active that the changeset was not applied.
    Failed {
        /// The changeset.
        seq: Seq,
        /// Why.
        failure: F,
    },
}

/// One session's intake.
#[derive(Debug)]
pub struct Intake<F> {
    /// The changeset under way: begun, not yet complete, not failed.
    current: Option<Current>,
    /// The last changeset that was begun, or was to be; frames of later ones wait for it.
    begun: Seq,
    /// Frames that wait for their changeset to begin.
    held: BTreeMap<StreamNo, Frame>,
    /// Frames that are being staged.
    staging: BTreeMap<StreamNo, Frame>,
    /// What is done once nothing is staged or applied.
    wanted: Option<Wanted>,
    /// The one thing that is being done to the changeset as a whole.
    doing: Option<Doing>,
    link: Link,
    effects: VecDeque<Effect<F>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    Up,
    /// Gone; what was begun is being given up.
    Closing,
    Closed,
}

#[derive(Debug)]
struct Current {
    seq: Seq,
    batches: u64,
    segments: u64,
    end: Option<End>,
}

#[derive(Debug, Clone, Copy)]
struct Frame {
    seq: Seq,
    kind: FrameKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Begin { seq: Seq, baseline: Baseline, acked: Seq },
    Abandon,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    Beginning(Seq),
    Finishing(Seq),
    Abandoning,
}

impl<F> Default for Intake<F> {
    fn default() -> Intake<F> {
        Intake::new()
    }
}

impl<F> Intake<F> {
    /// Begins with nothing under way.
    pub fn new() -> Intake<F> {
        Intake {
            current: None,
            begun: Seq(0),
            held: BTreeMap::new(),
            staging: BTreeMap::new(),
            wanted: None,
            doing: None,
            link: Link::Up,
            effects: VecDeque::new(),
        }
    }

    /// Takes one input.
    pub fn handle(&mut self, input: Input<F>) {
        match input {
            Input::Begin { seq, baseline, acked } => self.begin(seq, baseline, acked),
            Input::Begun(result) => self.begin_ended(result),
            Input::Arrived { stream, seq, kind } => self.arrived(stream, Frame { seq, kind }),
            Input::Staged { stream, result } => self.staged(stream, result),
            Input::End(end) => {
                if let Some(current) = self.current.as_mut().filter(|c| c.seq == end.seq) {
                    current.end = Some(end);
                }
            }
            Input::Abandon { seq } => {
                if self.current.take_if(|c| c.seq == seq).is_some() {
                    self.wanted = Some(Wanted::Abandon);
                }
            }
            Input::Abandoned => {
                let done = self.doing.take();
                assert_eq!(done, Some(Doing::Abandoning), "nothing was being given up");
                if self.link == Link::Closing && self.wanted.is_none() {
                    self.link = Link::Closed;
                }
            }
            Input::Finished(result) => self.finished(result),
            Input::Closed => self.close(),
        }
        self.advance();
    }

    /// The next thing to do.
    pub fn poll_effect(&mut self) -> Option<Effect<F>> {
        self.effects.pop_front()
    }

    /// Whether the next message of the control stream may be given to it, or acted on. What follows the end of a changeset
    /// waits until all of that has come.
    pub fn takes_messages(&self) -> bool {
        let is_ending = self.current.as_ref().is_some_and(|c| c.end.is_some());
        !is_ending && self.wanted.is_none() && !matches!(self.doing, Some(Doing::Beginning(_) | Doing::Abandoning))
    }

    /// Whether the link is gone and nothing more will be done.
    pub fn is_closed(&self) -> bool {
        self.link == Link::Closed
    }

    fn begin(&mut self, seq: Seq, baseline: Baseline, acked: Seq) {
        assert!(self.takes_messages(), "a message while the one before it is acted on");
        if self.link == Link::Up {
            self.current = None;
            self.wanted = Some(Wanted::Begin { seq, baseline, acked });
        }
    }

    fn begin_ended(&mut self, result: Result<(), F>) {
        let Some(Doing::Beginning(seq)) = self.doing.take() else { panic!("no changeset was being begun") };
        self.begun = seq;
        match result {
            Ok(()) if self.link == Link::Up => self.current = Some(Current { seq, batches: 0, segments: 0, end: None }),
            Ok(()) => {}
            Err(failure) => self.effects.push_back(Effect::Failed { seq, failure }),
        }
        for (stream, frame) in std::mem::take(&mut self.held) {
            self.arrived(stream, frame);
        }
    }

    fn arrived(&mut self, stream: StreamNo, frame: Frame) {
        assert!(!self.held.contains_key(&stream) && !self.staging.contains_key(&stream), "a second frame of a stream");
        if self.link != Link::Up {
            self.effects.push_back(Effect::Drop { stream });
        } else if frame.seq > self.begun {
            self.held.insert(stream, frame);
        } else if self.current.as_ref().is_some_and(|c| c.seq == frame.seq) {
            self.staging.insert(stream, frame);
            self.effects.push_back(Effect::Stage { stream });
        } else {
            self.effects.push_back(Effect::Drop { stream }); // of a changeset that is over
        }
    }

    fn staged(&mut self, stream: StreamNo, result: Result<(), F>) {
        let Some(frame) = self.staging.remove(&stream) else { panic!("no frame of this stream was being staged") };
        let Some(current) = self.current.as_mut().filter(|c| c.seq == frame.seq) else { return };
        match result {
            Ok(()) => {
                *(match frame.kind {
                    FrameKind::Batch => &mut current.batches,
                    FrameKind::Segment => &mut current.segments,
                }) += 1;
            }
            Err(failure) => {
                self.current = None;
                self.effects.push_back(Effect::Failed { seq: frame.seq, failure });
            }
        }
    }

    fn finished(&mut self, result: Result<Applied, F>) {
        let Some(Doing::Finishing(seq)) = self.doing.take() else { panic!("no changeset was being applied") };
        self.effects.push_back(match result {
            Ok(applied) => Effect::Acked(applied),
            Err(failure) => Effect::Failed { seq, failure },
        });
    }

    fn close(&mut self) {
        if self.link != Link::Up {
            return;
        }
        self.link = Link::Closing;
        self.current = None;
        self.wanted = Some(Wanted::Abandon);
        for (stream, _) in std::mem::take(&mut self.held) {
            self.effects.push_back(Effect::Drop { stream });
        }
    }

    /// Does what waited for the frames in staging, or for the changeset that is being applied.
    fn advance(&mut self) {
        if !self.staging.is_empty() || self.doing.is_some() {
            return;
        }
        match self.wanted.take() {
            Some(Wanted::Begin { seq, baseline, acked }) => {
                self.doing = Some(Doing::Beginning(seq));
                self.effects.push_back(Effect::Begin { seq, baseline, acked });
            }
            Some(Wanted::Abandon) => {
                self.doing = Some(Doing::Abandoning);
                self.effects.push_back(Effect::Abandon);
            }
            None => {
                let has_all =
                    |c: &Current, end: End| (c.batches, c.segments) == (end.batches, end.segments) || seeded_bug!(EndsBeforeAllFrames);
                let is_complete = |c: &mut Current| c.end.is_some_and(|end| has_all(c, end));
                if let Some(Current { seq, end: Some(end), .. }) = self.current.take_if(is_complete) {
                    self.doing = Some(Doing::Finishing(seq));
                    self.effects.push_back(Effect::Finish(end));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
