"""The generative model: flow, canonical map, and the images that they predict."""
