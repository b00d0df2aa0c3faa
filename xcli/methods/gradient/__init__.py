"""Attribution from gradients: at the picture, along paths, over noise, with other rules for rectifiers."""
