//! What is around the application on the active: is it healthy, how is it corrected, is it dead, who takes over.
//!
//! Architecture invariants:
//! - What is decided is decided in [`ladder`] and [`answer`], which know no process, file, socket or clock, and in
//!   functions over what was read.
//! - What acts is blocking and has a time limit: no call here waits for ever for an application that hangs.
//! - No text goes through a shell.

#![forbid(unsafe_code)]

pub mod answer;
pub mod dead;
pub mod health;
pub mod hook;
pub mod ladder;
pub mod observation;
