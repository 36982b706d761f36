//! Images: what one is, how it is identified and checked, and how it comes into and out of a store.
//!
//! An image is immutable. Its identity is the root of its digest tree ([`tree`]), which binds its size and every
//! block to its place; names are only labels that a [`crate::store::Store`] keeps.

pub mod archive;
pub mod export;
pub mod extents;
pub mod format;
pub mod import;
pub mod increment;
pub mod increment_file;
pub mod increment_tree;
pub mod manifest;
mod new_file;
pub mod page;
pub mod partial_tree;
mod qcow2;
pub mod qemu_img;
mod repair;
pub mod scan;
pub mod stored_disk;
pub mod tree;
pub mod tree_builder;
pub mod verify;
mod vmdk;
